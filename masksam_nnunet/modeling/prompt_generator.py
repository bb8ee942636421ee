"""What takes the place of the clicking user: masks, boxes and classifier tokens for SAM's decoder."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Grid, LightConfig, MaskSAMConfig
from .blocks import Trainable
from .decoders import LightDecoder, UNetDecoder
from .geometry import continued, extent_in_patch, to_masks, to_patch

FOREGROUND = 0.05
"""The share of foreground in the light decoder's maps at the start: most voxels are background."""


class Prompts(NamedTuple):
    """N prompts for each slice."""

    mask_logits: Tensor
    """(B, N, D, 4 g_h, 4 g_w)"""
    boxes: Tensor
    """(B, N, D, 4): x0 y0 x1 y1 as shares of the SAM input."""
    class_tokens: Tensor
    """(B, N, D, P)"""
    features: Tensor
    """The finest features, (B, w, D, 4 g_h, 4 g_w), or of the patch."""
    maps: tuple[Tensor, ...]
    """Where queries belong to classes: logits (B, N, d, h, w) of the patch, the finest first, which has the patch's
    size; those of the light decoder all have. Only the first in evaluation mode."""
    start: Tensor | None = None
    """Where there are maps: what the final mask logits start as, (B, N, D, H, W)."""


class PromptGenerator(Trainable):
    """Prompts from the maps and features of one of two decoders.

    Where queries belong to classes, the finest map is a softmax over all queries (a sigmoid with regions), and a
    query's mask prompt is its share against the rest: all of them start right as soon as the map is.
    """

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_queries: int) -> None:
        super().__init__()
        self.grid = grid = Grid.of(config)
        self.anchored, self.regions = config.anchored, config.regions
        self.depth, self.num_queries = grid.patch[0], num_queries
        self.token_side = math.isqrt(config.encoder.prompt_width)
        if self.token_side**2 != config.encoder.prompt_width:
            raise ValueError(
                f"prompt_width = {config.encoder.prompt_width} must be a square number: class tokens are square maps"
            )
        deep = config.loss.generator > 0
        self.decoder: LightDecoder | UNetDecoder
        if isinstance(config.generator, LightConfig):
            maps = 3 if self.anchored else 1
            self.decoder = LightDecoder(config.encoder, config.generator.widths, num_queries, maps, deep)
            if self.anchored:
                self._start_as_background(0 if self.regions else config.num_queries)
        else:
            self.decoder = UNetDecoder(config.encoder, config.generator, grid, in_channels, num_queries, deep)
        width = sum(self.decoder.widths)
        # One weight for each of four cells: a 1x1x1 convolution would show each coordinate one quadrant only.
        boxes = nn.Linear(4 * width, 4 * num_queries)
        with torch.no_grad():  # the first boxes are the middle: x0 y0 x1 y1 = .25 .25 .75 .75
            boxes.bias.copy_(torch.tensor([1 / 4, 1 / 4, 2 / 3, 2 / 3]).logit().repeat(num_queries))
        tokens = nn.Conv3d(width, num_queries, kernel_size=3, padding=1)
        # Named as what nnU-Net leaves out of pre-trained weights: another dataset has other classes.
        self.seg_layers = nn.ModuleDict({"to_boxes": boxes, "to_tokens": tokens})

    def _start_as_background(self, first: int) -> None:
        """``first``: the first query of foreground, 0 where each query has a sigmoid of its own."""
        odds = FOREGROUND / (1 - FOREGROUND)
        if first:
            odds *= first / max(1, self.num_queries - first)
        layers: Any = self.decoder.seg_layers
        for layer in layers:
            nn.init.constant_(layer.bias[first:], math.log(odds))

    def forward(self, image: Tensor, levels: list[Tensor], neck: Tensor) -> Prompts:
        """``image``: the patch (B, C, D, H, W); ``levels``: as the backbone declares them, (B, D, h, w, E); ``neck``:
        (B, D, P, g_h, g_w)."""
        features, maps = self.decoder(image, levels, neck)
        start = None
        if not self.anchored:
            logits, maps = continued(maps[0], self.grid), ()
        elif isinstance(self.decoder, LightDecoder):
            logits = continued(self.against_rest(maps[0]), self.grid)
            maps = tuple(to_patch(x, self.grid) for x in maps)
            start = self.against_rest(maps[0])
        else:
            start = self.against_rest(maps[0])
            logits = to_masks(start, self.grid)
        return Prompts(logits, self._boxes(features, logits), self._tokens(features), features[0], maps, start)

    def against_rest(self, maps: Tensor) -> Tensor:
        """The logit of each query's share, (B, N, ...), from a map; in float32 where shares sum to one."""
        if self.regions or maps.shape[1] == 1:
            return maps
        with torch.autocast(maps.device.type, enabled=False):
            log_p = maps.float().log_softmax(1)
            return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))

    def _boxes(self, features: tuple[Tensor, ...], mask_logits: Tensor) -> Tensor:
        pooled = torch.cat([F.adaptive_avg_pool3d(x, (self.depth, 2, 2)) for x in features], dim=1)
        cells = pooled.permute(0, 2, 1, 3, 4).flatten(2)  # (B, D, 4 sum(widths))
        raw = self.seg_layers["to_boxes"](cells).float().sigmoid().unflatten(-1, (self.num_queries, 4)).transpose(1, 2)
        corner, share = raw[..., :2], raw[..., 2:]
        boxes = torch.cat([corner, corner + (1 - corner) * share], dim=-1)  # (B, N, D, 4)
        extent, found = extent_in_patch(mask_logits.detach() > 0, self.grid)
        return torch.where(found[..., None], (boxes + extent) / 2, boxes)

    def _tokens(self, features: tuple[Tensor, ...]) -> Tensor:
        size = (self.depth, self.token_side, self.token_side)
        pooled = torch.cat([F.adaptive_avg_pool3d(x, size) for x in features], dim=1)
        return self.seg_layers["to_tokens"](pooled).flatten(3)  # (B, N, D, P)
