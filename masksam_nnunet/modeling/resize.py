"""In-plane resizing between the patch, the SAM input and SAM's mask size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..config import Grid


def resize_in_plane(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of the last two axes of a tensor of any rank."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*x.shape[:-2], *size)


def to_patch(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., 4 g_h, 4 g_w) to the patch: (..., H, W), the padding cut off."""
    _, height, width = grid.patch
    return resize_in_plane(x, grid.padded)[..., :height, :width]


def to_image(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., H, W) to SAM's input (..., S_h, S_w): padded with zeros at the lower right, then enlarged by u."""
    _, height, width = grid.patch
    padded = F.pad(x, (0, grid.padded[1] - width, 0, grid.padded[0] - height))
    return resize_in_plane(padded, grid.image)
