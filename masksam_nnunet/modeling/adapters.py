"""The adapters that make a frozen 2D transformer see neighbouring slices (MaskSAM, arXiv 2403.14103, section 3)."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import Trainable, zero_


def _bottleneck(width: int, ratio: float) -> int:
    return max(1, int(width * ratio))


class DConvAdapter(Trainable):
    """Linear down, GELU, a residual depth-wise 3x3x3 convolution over (D, h, w), Linear up (zero at first).

    Input and output: (B, D, h, w, E), channels last. The residual around the adapter is the caller's.
    """

    def __init__(self, width: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = _bottleneck(width, ratio)
        self.down = nn.Linear(width, hidden)
        self.conv = nn.Conv3d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.norm = nn.LayerNorm(hidden)
        self.act = nn.GELU()
        self.up = nn.Linear(hidden, width)
        zero_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.down(x))  # (B, D, h, w, E/4)
        y = self.conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return self.up(x + self.act(self.norm(y)))  # (B, D, h, w, E)


class DMLPAdapter(Trainable):
    """Linear down, GELU, a residual MLP along the slices (D -> 4D -> D), Linear up (zero at first).

    Input and output: (B, D, T, P). The residual around the adapter is the caller's.
    """

    def __init__(self, width: int, depth: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = _bottleneck(width, ratio)
        self.depth = depth
        self.down = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.along_depth = nn.Sequential(nn.Linear(depth, 4 * depth), nn.GELU(), nn.Linear(4 * depth, depth))
        self.up = nn.Linear(hidden, width)
        zero_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.down(x))  # (B, D, T, P/4)
        y = self.along_depth(x.transpose(1, -1)).transpose(1, -1)
        return self.up(x + y)  # (B, D, T, P)
