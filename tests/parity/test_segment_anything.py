"""With the new modules at their initial values, SAM's parts compute what segment-anything computes.

Full-size ViT-B, its weights written by segment-anything and read from a file. segment-anything starts position
parameters at zero: they are randomised, or a wrong one would not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, Sam
from torch import Tensor, nn

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.prompt_generator import Prompts

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4


@dataclass
class Pair:
    ours: MaskSAM
    theirs: Sam
    size: int


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sam, Path]:
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    with torch.no_grad():
        for name, parameter in sam.image_encoder.named_parameters():
            if "pos" in name:
                nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_b.pth"
    torch.save(sam.state_dict(), path)
    return sam, path


@pytest.fixture(scope="module", params=[1024, 512])
def pair(request: pytest.FixtureRequest, checkpoint: tuple[Sam, Path]) -> Iterator[Pair]:
    sam, path = checkpoint
    size = request.param
    config = MaskSAMConfig("vit_b", (1, size // 4, size // 4), resolution=4, num_queries=2)
    ours = MaskSAM(config, 1, 3).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
        ours.load_sam(path)
    yield Pair(ours, at_size(sam, size), size)


def at_size(sam: Sam, size: int) -> Sam:
    """segment-anything at another input size: relative positions are its own affair, absolute ones must be given."""
    if size == 1024:
        return sam
    state = sam.image_encoder.state_dict()
    grid = size // 16
    position = nn.functional.interpolate(
        state["pos_embed"].permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic", align_corners=False, antialias=True
    )
    state["pos_embed"] = position.permute(0, 2, 3, 1)
    encoder = ImageEncoderViT(
        img_size=1024,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
    )
    encoder.pos_embed = nn.Parameter(torch.zeros_like(state["pos_embed"]))
    encoder.load_state_dict(state)
    prompt = PromptEncoder(256, (grid, grid), (size, size), 16)
    prompt.load_state_dict(sam.prompt_encoder.state_dict())
    return Sam(encoder, prompt, sam.mask_decoder).eval()


@torch.no_grad()
def test_image_encoder(pair: Pair) -> None:
    images = torch.randn(1, 1, 3, pair.size, pair.size)
    levels, neck = pair.ours.image_encoder(images)
    expected = pair.theirs.image_encoder(images[0])
    torch.testing.assert_close(neck[0], expected, atol=TOLERANCE, rtol=0)
    assert len(levels) == 4 and expected.std() > 0.1
    again = pair.theirs.image_encoder.neck(levels[-1][0].permute(0, 3, 1, 2))
    torch.testing.assert_close(again, expected, atol=TOLERANCE, rtol=0)


def prompts(pair: Pair) -> Prompts:
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.3, 0.0, 1.0, 0.4]])
    return Prompts(
        mask_logits=3 * torch.randn(1, 2, 1, pair.size // 4, pair.size // 4),
        boxes=boxes.reshape(1, 2, 1, 4),
        class_tokens=torch.randn(1, 2, 1, 256),
        features=torch.zeros(0),
    )


def theirs_prompted(pair: Pair, given: Prompts) -> tuple[Tensor, Tensor]:
    return pair.theirs.prompt_encoder(
        points=None, boxes=given.boxes[0, :, 0] * pair.size, masks=given.mask_logits[0].float()
    )


@torch.no_grad()
def test_prompt_encoder(pair: Pair) -> None:
    given = prompts(pair)
    sparse, dense = pair.ours.prompt_encoder(given.boxes, given.mask_logits)  # dense has its channels last
    expected = theirs_prompted(pair, given)
    torch.testing.assert_close(sparse[0, :, 0], expected[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(dense[0, :, 0].permute(0, 3, 1, 2), expected[1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        pair.ours.prompt_encoder.dense_pe(), pair.theirs.prompt_encoder.get_dense_pe(), atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
def test_mask_decoder_given_our_classifier_token_as_one_more_prompt(pair: Pair) -> None:
    given = prompts(pair)
    grid = pair.size // 16
    image = torch.randn(1, 1, 256, grid, grid)
    decoder = pair.ours.mask_decoder
    encoder = pair.ours.prompt_encoder
    masks, _ = decoder(image, encoder.dense_pe(), *encoder(given.boxes, given.mask_logits), given.class_tokens)
    their_sparse, their_dense = theirs_prompted(pair, given)
    token = given.class_tokens[0] + decoder.class_token.weight  # (N, 1, P)
    expected, without = (
        pair.theirs.mask_decoder(
            image_embeddings=image[0],
            image_pe=pair.theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=their_dense,
            multimask_output=False,
        )[0]
        for sparse in (torch.cat([their_sparse, token], dim=1), their_sparse)
    )
    torch.testing.assert_close(masks[0], expected, atol=TOLERANCE, rtol=0)
    assert (masks[0] - without).abs().max() > 1e-3, "the classifier token must matter, or this test cannot fail"
