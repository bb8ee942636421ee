"""The building blocks of what is new beside SAM, and so trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

GAIN = 10.0
"""A gain grows so many times as fast as another parameter: it starts at zero, and a short training must reach 1."""


class Trainable(nn.Module):
    """A module that SAM does not have. All parameters in it and below it are trained.

    What is trained is thus stated by structure, not by the names of parameters. Idea: torchtune's adapters declare
    their own parameters (torchtune/modules/peft).
    """


class DepthEmbedding(Trainable):
    """A learned embedding of the slice index, zero at first. Shape (D, C), added to a channels-last tensor."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, channels))

    def forward(self) -> Tensor:
        return self.weight  # (D, C)


def zero_(layer: nn.Linear | nn.Conv3d) -> None:
    """Zero a layer, so that the residual it ends adds nothing at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ChannelGroupNorm(nn.GroupNorm):
    """Group normalisation with the constructor nnU-Net's blocks expect.

    Instance normalisation would erase a token grid of one cell, which a patch under 16 pixels has.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(math.gcd(8, channels) if channels > 8 else 1, channels, **kwargs)


class VoxelNorm(nn.InstanceNorm3d):
    """Instance normalisation that also takes a patch of one voxel, which has no deviation: its bias is left."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, True)


class ConvBlocks(StackedConvBlocks):
    """nnU-Net's blocks. On a CPU, a small input of one sample is taken twice.

    PyTorch leaves such a one to a kernel that unfolds it (Convolution.cpp, use_mkldnn): 4 to 8 times slower than
    oneDNN on two samples, and 27 times the memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        small = x.device.type == "cpu" and len(x) == 1 and x.shape[:-1].numel() <= 20480
        if small and not torch.is_autocast_enabled("cpu"):  # which only cost.py uses, for a GPU's step
            return super().forward(x.expand(2, *x.shape[1:]))[:1]
        return super().forward(x)


def conv_block(
    in_channels: int, out_channels: int, num_convs: int = 1, norm: type[nn.Module] = ChannelGroupNorm
) -> nn.Module:
    """``num_convs`` of [Conv3d 3x3x3, norm, LeakyReLU]; (B, C, D, h, w) to (B, C', D, h, w)."""
    return ConvBlocks(
        num_convs,
        nn.Conv3d,
        in_channels,
        out_channels,
        kernel_size=3,
        initial_stride=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def double_in_plane(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    """Transposed convolution that doubles height and width and leaves the slices alone."""
    return nn.ConvTranspose3d(in_channels, out_channels, kernel_size=(1, 2, 2), stride=(1, 2, 2))
