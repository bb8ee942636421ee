"""The adapted image encoder with segment-anything's own attention, which holds its matrix."""

from __future__ import annotations

from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor

from masksam_nnunet.modeling.image_encoder import AdaptedBlock, AdaptedImageEncoder


def plain_encoder(encoder: AdaptedImageEncoder, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """As ``encoder(images)``."""
    b, d = images.shape[:2]
    x = encoder.patch_embed(images.flatten(0, 1)) + encoder.pos_embed  # (B D, g_h, g_w, E)
    x = x.unflatten(0, (b, d)) + encoder.depth_embedding()[:, None, None]
    levels = []
    for index, block in enumerate(encoder.blocks):
        x = _block(block, x)
        if index in encoder.global_blocks:
            levels.append(x)
    neck = encoder.neck(x.flatten(0, 1).permute(0, 3, 1, 2))
    return levels, neck.unflatten(0, (b, d))


def _block(block: AdaptedBlock, x: Tensor) -> Tensor:
    b, d, h, w, _ = x.shape
    y = block.norm1(x).flatten(0, 1)  # (B D, g_h, g_w, E)
    if block.window_size > 0:
        y, padded = window_partition(y, block.window_size)
        y = window_unpartition(block.attn(y), block.window_size, padded, (h, w))
    else:
        y = block.attn(y)
    y = y.unflatten(0, (b, d))
    x = x + y + block.attention_adapter(y)
    y = block.norm2(x)
    return x + block.mlp(y) + 0.5 * block.mlp_adapter(y)
