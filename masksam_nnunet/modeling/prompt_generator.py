"""What takes the place of the clicking user: masks, boxes and classifier tokens for SAM's decoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import Backbone, Level
from .blocks import Trainable, conv_block, double_in_plane
from .geometry import mask_extent


class Prompts(NamedTuple):
    """N prompts for each slice."""

    mask_logits: Tensor
    """(B, N, D, 4 g_h, 4 g_w)"""
    boxes: Tensor
    """(B, N, D, 4): x0 y0 x1 y1 as shares of the SAM input."""
    class_tokens: Tensor
    """(B, N, D, P)"""
    features: Tensor
    """The finest features, (B, w_2, D, 4 g_h, 4 g_w)."""


class PromptGenerator(Trainable):
    """A 3D decoder over the encoder's levels, from the neck upwards: to once, twice and four times the token grid."""

    def __init__(self, backbone: Backbone, widths: tuple[int, int, int], depth: int, num_queries: int) -> None:
        super().__init__()
        coarse, middle, fine = widths
        self.depth = depth
        self.num_queries = num_queries
        self.token_side = math.isqrt(backbone.prompt_width)
        if self.token_side**2 != backbone.prompt_width:
            raise ValueError(
                f"prompt_width = {backbone.prompt_width} must be a square number: class tokens are square maps"
            )
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

        self.to_masks = nn.Conv3d(fine, num_queries, kernel_size=1)
        # One weight for each of four cells: a 1x1x1 convolution would show each coordinate one quadrant only.
        self.to_boxes = nn.Linear(4 * sum(widths), 4 * num_queries)
        self.to_tokens = nn.Conv3d(sum(widths), num_queries, kernel_size=3, padding=1)

    def forward(self, levels: list[Tensor], neck: Tensor) -> Prompts:
        """``levels``: as the backbone declares them, (B, D, h, w, E); ``neck``: (B, D, P, g_h, g_w)."""
        joining: dict[int, list[Tensor]] = {1: [], 2: [], 4: []}
        for level, project, x in zip(self.levels, self.project_levels, levels, strict=True):
            joining[level.feeds].append(project(x.permute(0, 4, 1, 2, 3)))
        coarse = self.coarse(torch.cat([self.project_neck(neck.transpose(1, 2)), *joining[1]], dim=1))  # scale 1
        middle = self.middle(torch.cat([self.up_middle(coarse), *joining[2]], dim=1))  # scale 2
        fine = self.fine(torch.cat([self.up_fine(middle), *joining[4]], dim=1))  # scale 4

        decoded = (coarse, middle, fine)
        mask_logits = self.to_masks(fine)  # (B, N, D, 4 g_h, 4 g_w)
        return Prompts(mask_logits, self._boxes(decoded, mask_logits), self._tokens(decoded), fine)

    def _boxes(self, decoded: tuple[Tensor, ...], mask_logits: Tensor) -> Tensor:
        pooled = torch.cat([F.adaptive_avg_pool3d(x, (self.depth, 2, 2)) for x in decoded], dim=1)
        cells = pooled.permute(0, 2, 1, 3, 4).flatten(2)  # (B, D, 4 sum(widths))
        raw = self.to_boxes(cells).float().sigmoid().unflatten(-1, (self.num_queries, 4)).transpose(1, 2)
        corner, share = raw[..., :2], raw[..., 2:]
        boxes = torch.cat([corner, corner + (1 - corner) * share], dim=-1)  # (B, N, D, 4)
        extent, found = mask_extent(mask_logits.detach() > 0)
        return torch.where(found[..., None], (boxes + extent) / 2, boxes)

    def _tokens(self, decoded: tuple[Tensor, ...]) -> Tensor:
        size = (self.depth, self.token_side, self.token_side)
        pooled = torch.cat([F.adaptive_avg_pool3d(x, size) for x in decoded], dim=1)
        return self.to_tokens(pooled).flatten(3)  # (B, N, D, P)
