"""Heads that turn the image embedding into maps of classes without a transformer (AutoSAM, arXiv 2306.13731)."""

from __future__ import annotations

import torch.nn.functional as F
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from .blocks import Trainable
from .class_decoder import SAMDecoder
from .encoded import Encoded


class ConvolutionHead(Trainable):
    """AutoSAM's CNN head (arXiv 2306.13731): two 1x1 convolutions to 1024 channels, then four blocks of two 3x3
    convolutions, each to half of them; the last two blocks double the size.

    Its weights start as nnU-Net's do: with PyTorch's own, fourteen layers without a norm let hardly anything through.
    """

    def __init__(self, config: MaskSAMConfig, _: int, num_classes: int) -> None:
        super().__init__()
        self.grid = Grid.of(config)
        width = 4 * config.encoder.prompt_width
        layers: list[nn.Module] = [_convolution(width // 4, width, 1), _convolution(width, width, 1)]
        for index in range(4):
            half = width // 2
            grows = index >= 2
            layers += [_convolution(width, width, 3), _convolution(width, width if grows else half, 3)]
            if grows:
                layers.append(nn.ConvTranspose2d(width, half, kernel_size=2, stride=2))
            width = half
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, kernel_size=3, padding=1))
        self.seg_layers = nn.ModuleList([nn.Conv2d(width, num_classes, kernel_size=1)])
        self.apply(InitWeights_He(0.0))

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return []

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        maps = self.seg_layers[0](self.layers(encoded.neck.flatten(0, 1)))  # (B D, K, 4 g_h, 4 g_w)
        return (encoded.of_patch(maps, self.grid),)


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=kernel, padding=kernel // 2), nn.ReLU(inplace=True)
    )


class LinearHead(nn.Module):
    """AutoSAM's linear head (arXiv 2306.13731): SAM's upscaling, which has SAM's name, and two 1x1 convolutions.

    The released code's activation of the logits, which leaves only positive ones, is left out.
    """

    def __init__(self, config: MaskSAMConfig, _: int, num_classes: int) -> None:
        super().__init__()
        self.output_upscaling = SAMDecoder(config).output_upscaling
        self.head = PointwiseHead(config.encoder.prompt_width // 8, num_classes)
        self.grid = Grid.of(config)

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return []

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        maps = self.head(self.output_upscaling(encoded.neck.flatten(0, 1)))  # (B D, K, 4 g_h, 4 g_w)
        return (encoded.of_patch(maps, self.grid),)


class PointwiseHead(Trainable):
    """Two 1x1 convolutions."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(channels, channels, kernel_size=1)
        self.seg_layers = nn.ModuleList([nn.Conv2d(channels, num_classes, kernel_size=1)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, K, h, w), from (M, channels, h, w)."""
        return self.seg_layers[0](F.relu(self.hidden(x)))
