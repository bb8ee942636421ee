"""The decoders of the prompt generator: over SAM's features alone, or nnU-Net's own U-Net with these at its skips."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from ..backbones import Backbone, Level
from ..config import Grid, UNetConfig
from .blocks import GAIN, VoxelNorm, conv_block, double_in_plane
from .geometry import to_patch

Decoded = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Features and maps of N logits, (B, channels, d, h, w), the finest first."""


class LightDecoder(nn.Module):
    """A 3D decoder over the encoder's levels, from the neck upwards: to once, twice and four times the token grid.

    ``num_maps``: at so many of these three it makes maps, from the finest; ``deep``: whether all of them are
    supervised, or only the finest.
    """

    def __init__(
        self, backbone: Backbone, widths: tuple[int, int, int], num_queries: int, num_maps: int, deep: bool
    ) -> None:
        super().__init__()
        self.wanted = num_maps if deep else 1
        coarse, middle, fine = widths
        self.widths = (fine, middle, coarse)
        self.levels = backbone.fed_levels
        width_at = {1: coarse, 2: middle, 4: fine}

        def project(level: Level) -> nn.Sequential:
            width, doublings = width_at[level.feeds], (level.feeds // level.scale).bit_length() - 1
            up = [double_in_plane(width, width) for _ in range(doublings)]
            return nn.Sequential(nn.Conv3d(level.width, width, kernel_size=1), *up)

        def joined(scale: int) -> int:
            return 1 + sum(level.feeds == scale for level in self.levels)

        self.project_neck = nn.Conv3d(backbone.prompt_width, coarse, kernel_size=1)
        self.project_levels = nn.ModuleList(map(project, self.levels))
        self.up_middle = double_in_plane(coarse, middle)
        self.up_fine = double_in_plane(middle, fine)
        self.coarse = conv_block(joined(1) * coarse, coarse)
        self.middle = conv_block(joined(2) * middle, middle)
        self.fine = conv_block(joined(4) * fine, fine)
        self.seg_layers = nn.ModuleList(
            nn.Conv3d(width, num_queries, kernel_size=1) for width in (fine, middle, coarse)[:num_maps]
        )

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return list(self.seg_layers)[self.wanted :]

    def forward(self, _: Tensor, levels: list[Tensor], neck: Tensor) -> Decoded:
        """Features and maps on SAM's grid; the arguments are those of :meth:`PromptGenerator.forward`."""
        joining: dict[int, list[Tensor]] = {1: [], 2: [], 4: []}
        for level, project, x in zip(self.levels, self.project_levels, levels, strict=True):
            joining[level.feeds].append(project(x.permute(0, 4, 1, 2, 3)))
        coarse = self.coarse(torch.cat([self.project_neck(neck.transpose(1, 2)), *joining[1]], dim=1))  # scale 1
        middle = self.middle(torch.cat([self.up_middle(coarse), *joining[2]], dim=1))  # scale 2
        fine = self.fine(torch.cat([self.up_fine(middle), *joining[4]], dim=1))  # scale 4
        features = (fine, middle, coarse)
        wanted = self.wanted if self.training else 1
        return features, tuple(head(x) for head, x in zip(self.seg_layers[:wanted], features, strict=False))


class SAMFeatures(nn.Module):
    """Features of SAM for one stage of the U-Net: projected, normalised, and with a gain that is zero at first."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(in_channels, out_channels, kernel_size=1)
        self.norm = VoxelNorm(out_channels)
        self.gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, out_channels, d, h, w), from (B, in_channels, d, h, w)."""
        features: Tensor = self.norm(self.project(x))
        return features * (GAIN * self.gain).to(features.dtype).view(-1, 1, 1, 1)


def planned_unet(config: UNetConfig, in_channels: int, num_maps: int) -> Any:
    """nnU-Net's U-Net, plain or with a residual encoder, with its initial weights."""
    stages = len(config.features)
    sizes = dict(
        input_channels=in_channels,
        n_stages=stages,
        features_per_stage=config.features,
        conv_op=nn.Conv3d,
        kernel_sizes=config.kernel_sizes,
        strides=config.strides,
        num_classes=num_maps,
        conv_bias=True,
        norm_op=VoxelNorm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    unet: PlainConvUNet | ResidualEncoderUNet
    if config.residual:
        decoder = (1,) * (stages - 1)
        unet = ResidualEncoderUNet(n_blocks_per_stage=config.blocks, n_conv_per_stage_decoder=decoder, **sizes)
    else:
        decoder = (2,) * (stages - 1)
        unet = PlainConvUNet(n_conv_per_stage=config.blocks, n_conv_per_stage_decoder=decoder, **sizes)
    unet.apply(unet.initialize)
    return unet


def run_decoder(unet: Any, skips: list[Tensor]) -> list[Tensor]:
    """The features (B, c, d, h, w) of a U-Net's decoder, the finest first, from its encoder's skips, which are too."""
    x = skips[-1]
    features: list[Tensor] = []
    for up, stage, skip in zip(unet.decoder.transpconvs, unet.decoder.stages, skips[-2::-1], strict=True):
        x = stage(torch.cat([up(x), skip], dim=1))
        features.insert(0, x)
    return features


class UNetDecoder(nn.Module):
    """nnU-Net's planned U-Net; each skip is given the coarsest of SAM's levels that are no coarser than the skip.

    The bottleneck is given the neck also where that is coarser, so that SAM is never left out. Without SAM's features,
    which enter through gains that are zero at first, it is nnU-Net. ``deep``: all its maps are supervised but the
    coarsest, to which nnU-Net gives no weight.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: UNetConfig,
        grid: Grid,
        in_channels: int,
        num_queries: int,
        deep: bool,
    ) -> None:
        super().__init__()
        stages = len(config.features)
        self.unet = planned_unet(config, in_channels, num_queries)
        self.wanted = max(1, stages - 2) if deep else 1
        self.widths = config.features[:-1]
        self.grid = grid

        scales = [level.scale for level in backbone.fed_levels] + [1]
        widths = [level.width for level in backbone.fed_levels] + [backbone.prompt_width]
        token = grid.padded[0] / grid.tokens[0]  # patch voxels that a token covers
        self.fed: list[tuple[int, ...]] = []
        """For each stage, the levels that it is given; the neck comes last."""
        stride, sam = [1, 1], list[nn.Module]()
        for features, step in zip(config.features, config.strides, strict=True):
            stride = [a * b for a, b in zip(stride, step[1:], strict=True)]
            fitting = [scale for scale in scales if token / scale <= min(stride)]
            fed = {i for i, scale in enumerate(scales) if fitting and scale == min(fitting)}
            if len(sam) == stages - 1:
                fed.add(len(scales) - 1)
            self.fed.append(tuple(sorted(fed)))
            sam.append(SAMFeatures(sum(widths[i] for i in fed), features) if fed else nn.Identity())
        self.sam = nn.ModuleList(sam)

    def unused(self) -> list[nn.Module]:
        """The heads of maps that are not supervised."""
        return list(self.unet.decoder.seg_layers)[::-1][self.wanted :]

    def forward(self, image: Tensor, levels: list[Tensor], neck: Tensor) -> Decoded:
        """Features and maps of the patch; the arguments are those of :meth:`PromptGenerator.forward`."""
        maps = [*(x.permute(0, 4, 1, 2, 3) for x in levels), neck.transpose(1, 2)]  # (B, E, D, h, w)
        skips = self.unet.encoder(image)
        skips = [
            skip + add(torch.cat([self._at(maps[i], skip) for i in fed], dim=1)) if fed else skip
            for skip, fed, add in zip(skips, self.fed, self.sam, strict=True)
        ]
        features = run_decoder(self.unet, skips)
        wanted = self.wanted if self.training else 1
        heads = list(self.unet.decoder.seg_layers)[::-1]
        return tuple(features), tuple(head(x) for head, x in zip(heads[:wanted], features, strict=False))

    def _at(self, level: Tensor, skip: Tensor) -> Tensor:
        """A level of SAM, which covers the padded patch, at the voxels of a skip, which covers the patch."""
        rows, columns = (
            round(cells * size / padded)
            for cells, size, padded in zip(level.shape[-2:], self.grid.patch[1:], self.grid.padded, strict=True)
        )
        depth, height, width = skip.shape[2:]
        if rows < height or columns < width:  # coarser than the skip
            level = to_patch(level, self.grid)
            rows, columns = level.shape[-2:]
        return F.adaptive_avg_pool3d(level[..., :rows, :columns], (depth, height, width))
