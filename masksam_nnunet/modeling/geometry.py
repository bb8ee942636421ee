"""Boxes, and in-plane resizing between the patch, the SAM input and SAM's mask size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Grid


def to_patch(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., 4 g_h, 4 g_w) to the patch: (..., H, W), the padding cut off."""
    _, height, width = grid.patch
    return _resize(x, grid.padded)[..., :height, :width]


def to_masks(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., H, W) to SAM's mask size (..., 4 g_h, 4 g_w); beyond the patch its edge goes on."""
    return _resize(_repeat_edge(x, grid.padded), grid.masks)


def continued(x: Tensor, grid: Grid) -> Tensor:
    """(..., 4 g_h, 4 g_w), in which the patch's edge goes on beyond the patch: losses see no more of it."""
    return _repeat_edge(_over_patch(x, grid), grid.masks)


def _over_patch(x: Tensor, grid: Grid) -> Tensor:
    """The part of (..., 4 g_h, 4 g_w) that covers the patch."""
    pairs = zip(grid.patch[1:], grid.masks, grid.padded, strict=True)
    rows, columns = (-(-size * cells // padded) for size, cells, padded in pairs)
    return x[..., :rows, :columns]


def _repeat_edge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Extend (..., h, w) to a size by its last row and column."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        missing = wanted - x.shape[axis]
        if missing:
            x = torch.cat([x, x.narrow(axis, -1, 1).repeat_interleave(missing, axis)], dim=axis)
    return x


def to_tokens(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., H, W) to the token grid (..., g_h, g_w), padded with zeros."""
    return _resize(pad(x, grid), grid.tokens)


def to_image(x: Tensor, grid: Grid) -> Tensor:
    """Bring (..., H, W) to SAM's input (..., S_h, S_w): padded with zeros at the lower right, then resized by r."""
    return _resize(pad(x, grid), grid.image)


def pad(x: Tensor, grid: Grid) -> Tensor:
    """Pad (..., H, W) with zeros at the lower right."""
    _, height, width = grid.patch
    if (height, width) == tuple(grid.padded):
        return x
    return F.pad(x, (0, grid.padded[1] - width, 0, grid.padded[0] - height))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the last two axes of a tensor of any rank: bilinearly, or by averages where they shrink by a factor.

    In the input's number format: CUDA's autocast would give float32.
    """
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    flat = x.reshape(-1, 1, height, width)
    if height > size[0]:
        resized = F.avg_pool2d(flat, height // size[0])
    else:
        resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.to(x.dtype).reshape(*x.shape[:-2], *size)


def mask_extent(masks: Tensor) -> tuple[Tensor, Tensor]:
    """The box around each mask, as shares of its size.

    Args:
        masks: boolean (..., h, w).

    Returns:
        x0 y0 x1 y1 (..., 4) in [0, 1], zero where the mask is empty; and whether it is not empty (...).
    """
    ends = []
    bytes_ = masks.view(torch.uint8)  # any() is several times slower on a CPU
    for any_line in (bytes_.amax(-2) > 0, bytes_.amax(-1) > 0):  # columns (..., w), rows (..., h)
        size = any_line.shape[-1]
        index = torch.arange(size, device=masks.device)
        low = torch.where(any_line, index, size).amin(-1)
        high = torch.where(any_line, index + 1, 0).amax(-1)
        ends.append((low / size, high / size))
    (x0, x1), (y0, y1) = ends
    found = any_line.any(-1)
    return torch.stack([x0, y0, x1, y1], dim=-1) * found[..., None], found


def extent_in_patch(masks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """As :func:`mask_extent`, of masks (..., 4 g_h, 4 g_w) as far as they cover the patch."""
    masks = _over_patch(masks, grid)
    extent, found = mask_extent(masks)
    rows, columns = (size / whole for size, whole in zip(masks.shape[-2:], grid.masks, strict=True))
    return scaled_boxes(extent, columns, rows), found


def scaled_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """x0 y0 x1 y1 (..., 4), times width and height. Numbers, as a tensor of them would be copied to a GPU."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([x0 * width, y0 * height, x1 * width, y1 * height], dim=-1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes x0 y0 x1 y1 (..., 4), in [-1, 1]; 0 for two boxes of no area."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    tiny = torch.finfo(a.dtype).tiny
    union = area - inter
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
