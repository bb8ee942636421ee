"""Masks at patch resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import Grid
from .blocks import GAIN, Trainable, VoxelNorm, conv_block, zero_
from .geometry import to_patch


class MaskHead(Trainable):
    """Brings SAM's masks to the patch and adds a residual, zero at first, that sees the image at full resolution.

    Everything in SAM works on its token grid or is upsampled from there; fine structures need early features (HQ-SAM,
    arXiv 2306.01567). The inputs are projected to one width and added, which is a 1x1x1 convolution of their
    concatenation without ever holding it. Masks enter as numbers in [-1, 1]: logits of 20 would drown the features.

    Args:
        num_queries: N.
        feature_widths: channels of the features.
        on_grid: how many of the features, the first ones, are on SAM's grid; the others are of the patch.
        width: channels of the residual.
        grid: sizes of the network.
        gains: whether SAM's masks are added to the generator's with a gain for each query, zero at first.
    """

    def __init__(
        self, num_queries: int, feature_widths: Sequence[int], on_grid: int, width: int, grid: Grid, gains: bool
    ) -> None:
        super().__init__()
        self.grid, self.on_grid = grid, on_grid
        self.from_features = nn.ModuleList(nn.Conv3d(w, width, kernel_size=1) for w in feature_widths)
        self.convs = conv_block(width, width, num_convs=2, norm=VoxelNorm)
        from_masks = nn.Conv3d(num_queries, width, kernel_size=1)
        residual = nn.Conv3d(width, num_queries, kernel_size=1)
        zero_(residual)
        of_masks = nn.ParameterList([torch.zeros(num_queries)] if gains else [])
        # Named as what nnU-Net leaves out of pre-trained weights: another dataset has other classes.
        self.seg_layers = nn.ModuleDict({"from_masks": from_masks, "residual": residual, "gains": of_masks})

    @property
    def gain(self) -> Tensor | None:
        """That of SAM's masks, (N,); None where there is none."""
        of_masks = [*self.seg_layers["gains"].parameters()]
        return GAIN * of_masks[0] if of_masks else None

    def forward(self, masks: Tensor, start: Tensor | None, *features: Tensor) -> Tensor:
        """Refine the masks.

        Args:
            masks: SAM's logits (B, N, D, 4 g_h, 4 g_w).
            start: the generator's logits (B, N, D, H, W) with gains, else None.
            features: (B, width, D, 4 g_h, 4 g_w) those on SAM's grid, (B, width, D, H, W) those of the patch.

        Returns:
            Mask logits (B, N, D, H, W).
        """
        masks = to_patch(masks, self.grid)  # (B, N, D, H, W)
        x = self.seg_layers["from_masks"]((masks / 2).tanh())
        for index, (project, each) in enumerate(zip(self.from_features, features, strict=True)):
            each = project(each)
            x = x + (to_patch(each, self.grid) if index < self.on_grid else each)
        residual: Tensor = self.seg_layers["residual"](self.convs(x))
        gain = self.gain
        if gain is None or start is None:
            return masks + residual
        return start + gain.to(masks.dtype).view(-1, 1, 1, 1) * masks + residual
