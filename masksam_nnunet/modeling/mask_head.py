"""Masks at patch resolution."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import Grid
from .blocks import Trainable, VoxelNorm, conv_block, zero_
from .geometry import to_patch


class MaskHead(Trainable):
    """Brings masks to the patch and adds a residual, zero at first, that sees the image at full resolution.

    Everything before works on SAM's token grid or is upsampled from there; fine structures need early
    features (HQ-SAM, arXiv 2306.01567). The three inputs are projected to one width and added, which is a 1x1x1
    convolution of their concatenation without ever holding it.
    """

    def __init__(self, num_queries: int, fine_width: int, stem_width: int, width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.from_masks = nn.Conv3d(num_queries, width, kernel_size=1)
        self.from_generator = nn.Conv3d(fine_width, width, kernel_size=1)
        self.from_stem = nn.Conv3d(stem_width, width, kernel_size=1)
        self.convs = conv_block(width, width, num_convs=2, norm=VoxelNorm)
        self.residual = nn.Conv3d(width, num_queries, kernel_size=1)
        zero_(self.residual)

    def forward(self, masks: Tensor, generator: Tensor, stem: Tensor) -> Tensor:
        """Refine the masks.

        Args:
            masks: logits (B, N, D, 4 g_h, 4 g_w).
            generator: the prompt generator's finest features (B, w_2, D, 4 g_h, 4 g_w).
            stem: features at patch resolution (B, stem_width, D, H, W).

        Returns:
            Mask logits (B, N, D, H, W).
        """
        masks = to_patch(masks, self.grid)  # (B, N, D, H, W)
        x = self.from_masks(masks) + to_patch(self.from_generator(generator), self.grid) + self.from_stem(stem)
        return masks + self.residual(self.convs(x))
