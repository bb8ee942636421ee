"""DB-SAM's second branch (MICCAI 2024): convolutions beside the encoder, which exchange with it after each level."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import Backbone
from .adapters import ChannelAttention
from .blocks import Trainable, zero_

KEYS = 16
"""Side of the grid to which what is attended to is averaged."""


class Exchange(nn.Module):
    """Tokens attend to those of the other branch, then an MLP of four times their width; both add nothing at first.

    The authors' attention looks at four sampled points, by an operator of its own; here it looks at all of a grid of
    averages.
    """

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.norm, self.norm_other = nn.LayerNorm(width), nn.LayerNorm(other)
        self.heads = width // 64 if width % 64 == 0 else max(1, width // 32)
        self.query, self.both = nn.Linear(width, width), nn.Linear(other, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        last: Any = self.mlp[-1]
        for layer in (self.out, last):
            zero_(layer)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x (M, h, w, E) after it has attended to the other (M, h', w', E')."""

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, heads, n, c)

        size = min(KEYS, other.shape[1]), min(KEYS, other.shape[2])
        averaged = F.adaptive_avg_pool2d(self.norm_other(other).permute(0, 3, 1, 2), size)
        keys, values = self.both(averaged.flatten(2).transpose(1, 2)).chunk(2, dim=-1)  # (M, n', E)
        queries = self.query(self.norm(x).flatten(1, 2))
        mixed = F.scaled_dot_product_attention(heads(queries), heads(keys), heads(values))
        x = x + self.out(mixed.transpose(1, 2).flatten(2)).view(x.shape)
        return x + self.mlp(x)


class ConvolutionBranch(Trainable):
    """A map of convolutions on the token grid, and its exchanges with an encoder's levels.

    Levels that no transformer made, TinyViT's first, have none. Nothing is changed at first.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        widths = [level.width for level in backbone.fed_levels]
        self.first = sum(level.scale == 4 for level in backbone.levels)  # a level of convolutions
        width = backbone.prompt_width
        layers: list[nn.Module] = []
        doublings = int(math.log2(backbone.stride))
        for index in range(doublings):
            channels = 3 if index == 0 else width // 2 ** (doublings - index)
            wider = width // 2 ** (doublings - 1 - index)
            layers += [
                nn.Conv2d(channels, wider, kernel_size=3, stride=2, padding=1),
                nn.GroupNorm(1, wider),
                nn.GELU(),
            ]
        self.stem = nn.Sequential(*layers)
        own = widths[self.first :]
        self.channel_attention = nn.ModuleList(map(ChannelAttention, own))
        self.to_tokens = nn.ModuleList(Exchange(each, width) for each in own)
        self.to_branch = nn.ModuleList(Exchange(width, each) for each in own)
        self.project = nn.Linear(width, own[-1])
        self.gate = nn.Parameter(torch.zeros(own[-1]))

    def start(self, images: Tensor) -> Tensor:
        """The branch's map (B D, g_h, g_w, width) of SAM's input (B, D, 3, S_h, S_w)."""
        return self.stem(images.flatten(0, 1)).permute(0, 2, 3, 1)

    def exchange(self, level: int, tokens: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, D, h, w, E) and the branch's map after channel attention and an exchange both ways."""
        index = level - self.first
        x = tokens.flatten(0, 1)
        x = x + self.channel_attention[index](x)
        attended = self.to_tokens[index](x, beside)
        return attended.unflatten(0, tokens.shape[:2]), self.to_branch[index](beside, x)

    def fuse(self, tokens: Tensor, beside: Tensor) -> Tensor:
        """Tokens (B, D, g_h, g_w, E) with a share of the branch, which starts at zero."""
        added: Tensor = self.gate * self.project(beside)
        return tokens + added.unflatten(0, tokens.shape[:2])
