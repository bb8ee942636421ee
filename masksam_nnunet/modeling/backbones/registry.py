"""segment-anything's image encoder, prompt encoder and mask decoder at the size a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn

from ...config import BACKBONES, SAM_OF, Grid
from ..adapters import DConvAdapter
from ..trainable import Trainable


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes of one image encoder and of the decoder that goes with it, and its adapters."""

    width: int
    """E: channels of each of the four levels that feed the prompt generator."""
    depth: int = 0
    heads: int = 0
    global_blocks: tuple[int, ...] = ()
    """Blocks with global attention, whose outputs feed the prompt generator."""
    window: int = 14
    prompt_width: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    mask_channels: int = 16
    sam: str | None = None
    """The released SAM whose weights the ViT, the prompt encoder and the mask decoder hold, frozen; None: all that
    is not frozen by ``encoder`` is trained."""
    adapter: Callable[[int, float], Trainable] = DConvAdapter
    """Makes an adapter from E and its bottleneck's share of it: two for each block of the ViT, each a map of
    (B, D, g_h, g_w, E) to the same shape that is zero at first."""
    encoder: Callable[[BackboneSpec, Grid], nn.Module] | None = None
    """Makes another image encoder than SAM's ViT. Its ``forward`` takes images (B, D, 3, S_h, S_w) and returns what
    :class:`AdaptedImageEncoder` does: four levels (B, D, g_h, g_w, E), shallow to deep, and (B, D, P, g_h, g_w)."""


# ViT-B, L and H as in segment_anything/build_sam.py; tiny is ours.
SPECS = {
    "tiny": BackboneSpec(128, 4, 4, (0, 1, 2, 3), window=0, prompt_width=64, decoder_mlp=128, decoder_heads=4),
    "vit_b": BackboneSpec(768, 12, 12, (2, 5, 8, 11), sam="vit_b"),
    "vit_l": BackboneSpec(1024, 24, 16, (5, 11, 17, 23), sam="vit_l"),
    "vit_h": BackboneSpec(1280, 32, 16, (7, 15, 23, 31), sam="vit_h"),
}


def register_backbone(name: str, spec: BackboneSpec) -> None:
    """Make ``name`` a backbone that configs, and so plans and trainers, may name.

    Call it in the module that holds the trainer: it is imported with the trainer, or when plans that name an unknown
    backbone are read. Registering a name again replaces it, since nnU-Net imports a trainer's module more than once.

    Raises:
        ValueError: the name is one of this project's own, or the spec asks for what cannot be.
    """
    if name in BACKBONES:
        raise ValueError(f"backbone {name!r} is this project's own: register yours under another name")
    if spec.sam is not None and spec.sam not in SAM_OF:
        raise ValueError(f"backbone {name!r}: sam = {spec.sam!r} was never released, give vit_b, vit_l, vit_h or None")
    if spec.sam is not None and spec.encoder is not None:
        raise ValueError(
            f"backbone {name!r}: SAM's checkpoint of {spec.sam} does not fit an encoder of your own: leave out sam, "
            "and load and freeze what you have in the function that makes the encoder"
        )
    SPECS[name] = spec
    SAM_OF[name] = spec.sam


def build_image_encoder(spec: BackboneSpec, grid: Grid) -> ImageEncoderViT:
    """SAM's ViT whose position parameters fit the token grid, square or not."""
    encoder = ImageEncoderViT(
        img_size=16,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.heads,
        out_chans=spec.prompt_width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=spec.window,
        global_attn_indexes=spec.global_blocks,
    )
    # ImageEncoderViT knows square inputs only; its position parameters alone depend on the size.
    rows, columns = grid.tokens
    encoder.img_size = max(grid.image)
    encoder.pos_embed = nn.Parameter(torch.zeros(1, rows, columns, spec.width))
    head = spec.width // spec.heads
    for index in spec.global_blocks:
        attention = encoder.blocks[index].attn
        attention.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, head))
        attention.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, head))
    nn.init.normal_(encoder.pos_embed, std=0.02)
    return encoder


def build_prompt_encoder(spec: BackboneSpec, grid: Grid) -> PromptEncoder:
    """SAM's prompt encoder for boxes in pixels of the SAM input and masks at a quarter of it."""
    return PromptEncoder(
        embed_dim=spec.prompt_width,
        image_embedding_size=grid.tokens,
        input_image_size=grid.image,
        mask_in_chans=spec.mask_channels,
    )


def build_mask_decoder(spec: BackboneSpec) -> MaskDecoder:
    """SAM's mask decoder."""
    return MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=spec.prompt_width, mlp_dim=spec.decoder_mlp, num_heads=spec.decoder_heads
        ),
        transformer_dim=spec.prompt_width,
        iou_head_depth=3,
        iou_head_hidden_dim=spec.prompt_width,
    )
