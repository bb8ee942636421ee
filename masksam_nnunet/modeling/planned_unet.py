"""nnU-Net's planned U-Net in the related methods: with SAM's features at its skips, or as a network that prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig, UNetConfig
from .blocks import Trainable
from .class_decoder import PerClassDecoder
from .decoders import UNetDecoder, planned_unet, run_decoder
from .encoded import Encoded
from .geometry import pad


def _unet(config: MaskSAMConfig) -> UNetConfig:
    assert isinstance(config.generator, UNetConfig)  # the config sees to it
    return config.generator


class UNetHead(Trainable):
    """nnU-Net's U-Net with SAM's features at its skips, supervised at all its strides as nnU-Net's own."""

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        given = config.encoder, _unet(config), Grid.of(config), in_channels, num_classes
        self.decoder = UNetDecoder(*given, deep=True)

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return self.decoder.unused()

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        _, maps = self.decoder(encoded.volume, encoded.levels, encoded.neck)
        return maps


class PromptNetwork(Trainable):
    """A U-Net that sees the image and gives each class a dense prompt, (B, K, D, P, g_h, g_w) in [-1, 1]."""

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        unet, width = _unet(config), config.encoder.prompt_width
        self.grid = grid = Grid.of(config)
        self.unet = planned_unet(unet, in_channels, 1)
        channels, layers = unet.features[0], list[nn.Module]()
        doublings = int(math.log2(grid.padded[0] // grid.tokens[0]))
        for index in range(doublings):
            wider = width if index == doublings - 1 else min(2 * channels, width)
            layers += [nn.Conv3d(channels, wider, (1, 2, 2), stride=(1, 2, 2)), nn.LeakyReLU()]
            channels = wider
        self.to_grid = nn.Sequential(*layers)
        self.seg_layers = nn.ModuleList([nn.Conv3d(channels, num_classes * width, kernel_size=1)])
        self.num_classes = num_classes

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return [self.unet.decoder.seg_layers]

    def forward(self, volume: Tensor) -> Tensor:
        features = run_decoder(self.unet, self.unet.encoder(volume))[0]  # (B, c, D, H, W)
        prompts: Tensor = self.seg_layers[0](self.to_grid(pad(features, self.grid)))  # (B, K P, D, g_h, g_w)
        return prompts.tanh().unflatten(1, (self.num_classes, -1)).transpose(2, 3)


class PromptedDecoder(PerClassDecoder):
    """SAM's frozen decoder for each class by itself, prompted by a network that sees the image (AutoSAM, arXiv
    2306.06370). Several classes are this project's extension of the authors' one."""

    gives_prompts = True

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_classes: int) -> None:
        super().__init__(config)
        self.prompts = PromptNetwork(config, in_channels, num_classes)

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return [*super().unused(), *self.prompts.unused()]

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        prompts = self.prompts(encoded.volume).unbind(1)
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        return (self.decode_classes(encoded, [tokens] * len(prompts), prompts),)
