"""The adapters that make a frozen 2D transformer see neighbouring slices (MaskSAM, arXiv 2403.14103, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Trainable, zero_

Before = Callable[[int], nn.Module] | None
"""Makes the adapters that precede a block's attention and MLP, from its width."""


def adapters_before(width: int, make: Before) -> nn.ModuleList | None:
    """A block's two adapters before its attention and before its MLP."""
    return None if make is None else nn.ModuleList(make(width) for _ in range(2))


def _bottleneck(width: int, ratio: float) -> int:
    return max(1, int(width * ratio))


class NoAdapter(nn.Module):
    """Takes the place of an adapter that is left out; adds zero."""

    def __init__(self, _: int, __: float) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


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
        return self.up(x + self.act(self.norm(self._convolve(x))))  # (B, D, h, w, E)

    def _convolve(self, x: Tensor) -> Tensor:
        device = x.device.type
        if device == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return depthwise_by_slices(self.conv, x)
        return depthwise(self.conv, x, copy=device == "cuda")


def depthwise(conv: nn.Conv3d, x: Tensor, copy: bool) -> Tensor:
    """A depth-wise convolution of (B, D, h, w, C), as it is; ``copy``: of a copy that has channels first.

    Channels last, PyTorch takes cuDNN, whose 3D depth-wise kernels are several times slower than PyTorch's own (its
    pull requests 40801 and 51027).
    """
    x = x.permute(0, 4, 1, 2, 3)
    return conv(x.contiguous() if copy else x).permute(0, 2, 3, 4, 1)


def depthwise_by_slices(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """The same as a sum of three 2D convolutions: the 3D one's backward pass takes 3 to 5 times as long on a CPU."""
    d = x.shape[1]
    slices = F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, 0, 1, 1))  # (D + 2, B, h, w, C)
    parts = [
        F.conv2d(
            slices[k : k + d].flatten(0, 1).permute(0, 3, 1, 2),
            conv.weight[:, :, k],
            conv.bias if k == 1 else None,
            padding=1,
            groups=conv.groups,
        )
        for k in (range(3) if d > 1 else (1,))
    ]  # each (D B, C, h, w)
    return sum(parts[1:], parts[0]).permute(0, 2, 3, 1).unflatten(0, (d, -1)).transpose(0, 1)


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


class DepthConvAdapter(Trainable):
    """MA-SAM's adapter (arXiv 2309.08842): norm, Linear down, a convolution along the slices, GELU, Linear up.

    Its width is 384 whatever E is. Its last layer is zero at first, unlike the authors', so that a training starts
    from SAM. Input and output: (B, D, h, w, E), channels last. The residual around the adapter is the caller's.
    """

    def __init__(self, width: int, hidden: int = 384) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden, bias=False)
        self.conv = nn.Conv3d(hidden, hidden, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.act = nn.GELU()
        self.up = nn.Linear(hidden, width, bias=False)
        zero_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.norm(x))  # (B, D, h, w, 384)
        x = self.act(self.conv(x.permute(0, 4, 1, 2, 3))).permute(0, 2, 3, 4, 1)
        return self.up(x)


class ChannelAttention(Trainable):
    """DB-SAM's channel attention: norm, depth-wise 3x3 convolution, GELU, squeeze and excitation, Linear (zero first).

    Input and output: (M, h, w, E), channels last. The residual around it is the caller's.
    """

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.act = nn.GELU()
        hidden = max(1, width // reduction)
        self.squeeze = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())
        self.project = nn.Linear(width, width)
        zero_(self.project)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.norm(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # (M, h, w, E)
        x = x * self.squeeze(x.mean((1, 2)))[:, None, None]
        return self.project(x)
