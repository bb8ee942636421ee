"""TinyViT (arXiv 2207.10666) over the slices of a volume, with adapters: the encoder of LiteMedSAM and MobileSAM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import ConvNorm, MBConv, PatchMerging, TinyVitBlock
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import Grid, MaskSAMConfig
from ..method import find_method
from .adapters import Before, adapters_before
from .blocks import DepthEmbedding
from .compute import apply_neck, in_pieces, recomputed
from .weight_deltas import change_projections

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
PIXELS_AT_ONCE = 2**16
"""Pixels of the finest map that the convolutions before the first adapter take at a time; a slice of more is whole."""
MOST_WINDOWS = 2**15
"""Windows whose attention is one call: cuDNN fails for 2^16 and more."""


class AdaptedBlock(TinyVitBlock):
    """A block of TinyViT with two adapters, as SAM's: one follows the attention, one runs parallel to the MLP."""

    def __init__(self, backbone: Backbone, stage: int, ratio: float, before: Before = None) -> None:
        width = WIDTHS[stage]
        super().__init__(width, HEADS[stage], WINDOWS[stage])
        self.attention_adapter = backbone.make_adapter(width, ratio)
        self.mlp_adapter = backbone.make_adapter(width, ratio)
        self.before = adapters_before(width, before)

    def forward(self, x: Tensor, slices_at_once: int | None) -> Tensor:  # type: ignore[override]
        """The adapted block; x and the result are (B, D, h, w, E)."""
        lead = x.shape[:2]
        pieces = partial(in_pieces, slices_at_once, self.training)
        if self.before is not None:
            x = x + self.before[0](x)
        y = pieces(self._attend, x.flatten(0, 1)).unflatten(0, lead)
        x = x + y + self.attention_adapter(y)
        x = _convolved(self.local_conv, x.flatten(0, 1)).unflatten(0, lead)
        if self.before is not None:
            x = x + self.before[1](x)
        y = self.mlp.norm(x)
        mlp = pieces(self._mlp, y.flatten(0, 1)).unflatten(0, lead)
        return x + mlp + 0.5 * self.mlp_adapter(y)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))

    def _attend(self, x: Tensor) -> Tensor:
        """Attention in windows, (M, h, w, E). TinyViT fills the last ones up with zeros, see :meth:`_within`."""
        attn: Any = self.attn
        side = self.window_size
        bias = attn.attention_biases[:, attn.attention_bias_idxs].unflatten(2, (side, side)).unflatten(1, (side, side))
        down, across = (_spans(size, side) for size in x.shape[1:3])
        rows = [
            _joined([self._within(x[:, r, c], bias[:, :height, :width]) for c, width in across], dim=2)
            for r, height in down
        ]
        return _joined(rows, dim=1)

    def _within(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attention in windows of one size that is no larger than a whole one, (M, h, w, E).

        Zeros that would fill up the window all have the same key and value. One stands for them, whose bias is the
        logarithm of their summed weights: the result is the same.

        Args:
            x: any number of windows side by side.
            bias: (heads, rows, columns, side, side): of the window's cells as queries, a whole window's as keys.
        """
        m, h, w, e = x.shape
        attn: Any = self.attn
        _, height, width, side, _ = bias.shape
        windows = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # (M, down, across, ...)
        tokens = windows.flatten(3, 4).flatten(0, 2)  # (windows, n, E)
        bias = bias.flatten(1, 2)  # (heads, n, side, side)
        own = bias[:, :, :height, :width].flatten(2)
        if height * width < side**2:
            zeros = torch.cat([bias[:, :, height:].flatten(2), bias[:, :, :height, width:].flatten(2)], dim=2)
            own = torch.cat([own, zeros.logsumexp(2, keepdim=True)], dim=2)
            tokens = F.pad(tokens, (0, 0, 0, 1))
        qkv = attn.qkv(attn.norm(tokens)).unflatten(-1, (attn.num_heads, 3, -1))  # (windows, n + 1, heads, 3, c)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        own = own.to(q.dtype)[None]
        parts = zip(*(x.split(MOST_WINDOWS) for x in (q[:, :, : height * width], k, v)), strict=True)
        y = _joined([F.scaled_dot_product_attention(a, b, c, attn_mask=own) for a, b, c in parts], dim=0)
        y = attn.proj(y.transpose(1, 2).flatten(2))  # (windows, n, E)
        return y.view(windows.shape).transpose(2, 3).reshape(m, h, w, e)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """One part, as where windows fit, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _spans(size: int, side: int) -> list[tuple[slice, int]]:
    """The part of an axis that whole windows fill, and what is left, each with the size of its windows."""
    whole = size - size % side
    parts = (slice(0, whole), side), (slice(whole, size), size - whole)
    return [(part, cells) for part, cells in parts if part.start < part.stop]


class AdaptedTinyViT(nn.Module):
    """TinyViT with what the config's method adds to it, in MaskSAM's a depth embedding and two adapters a block.

    With the stem of LiteMedSAM (stride 4) or MobileSAM (stride 16), and a neck as SAM's. Batch norms are folded into
    their convolutions as in evaluation mode.
    """

    takes_adaptations = True

    def __init__(self, backbone: Backbone, config: MaskSAMConfig) -> None:
        super().__init__()
        fine = {"ks": 1} if backbone.stride == 4 else {"ks": 3, "stride": 2, "pad": 1}
        self.stem = nn.ModuleList([ConvNorm(3, WIDTHS[0] // 2, **fine), ConvNorm(WIDTHS[0] // 2, WIDTHS[0], **fine)])
        self.convolutions = nn.ModuleList(MBConv(WIDTHS[0], WIDTHS[0], 4.0, nn.GELU, 0.0) for _ in range(DEPTHS[0]))
        merges = [PatchMerging(WIDTHS[i], WIDTHS[i + 1], nn.GELU) for i in range(3)]
        merges[-1].conv2.conv.stride = (1, 1)
        self.merges = nn.ModuleList(merges)
        adaptation = find_method(config.method).adaptation
        self.stages = nn.ModuleList(
            nn.ModuleList(
                AdaptedBlock(backbone, stage, config.encoder_ratio, adaptation.before) for _ in range(DEPTHS[stage])
            )
            for stage in (1, 2, 3)
        )
        if adaptation.delta is not None:
            blocks = [block for block in self.stages.modules() if isinstance(block, AdaptedBlock)]
            self.shared = change_projections([block.attn for block in blocks], adaptation.delta, interleaved=True)
        self.branch = adaptation.branch(backbone) if adaptation.branch is not None else None
        width = backbone.prompt_width
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )
        self.grid = Grid.of(config)
        self.depth_embedding = DepthEmbedding(self.grid.patch[0], WIDTHS[1]) if adaptation.depth_embedding else None
        self.checkpointing = config.checkpointing
        self.slices_at_once: int | None = None
        """How many of a batch's B·D slices the frozen layers take at a time; None for all."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode images (B, D, 3, S_h, S_w).

        Returns:
            The outputs of the four stages, (B, D, 4 g_h, 4 g_w, 64), (B, D, 2 g_h, 2 g_w, 128), (B, D, g_h, g_w, 160)
            and (B, D, g_h, g_w, 320), and the neck's output (B, D, P, g_h, g_w).
        """
        lead = images.shape[:2]
        x = images.flatten(0, 1).permute(0, 2, 3, 1)  # (B D, S_h, S_w, 3)
        pixels = 16 * self.grid.tokens[0] * self.grid.tokens[1]  # of the finest map
        size = max(1, PIXELS_AT_ONCE // pixels)

        def frozen(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            """A few slices at a time, and again in the backward pass, which only a learned mix of channels has."""
            return torch.cat([recomputed(images.requires_grad, function, piece) for piece in x.split(size)])

        level = frozen(self._convolve, x)  # (B D, 4 g_h, 4 g_w, 64)
        levels = [level.unflatten(0, lead)]
        stages: Any = self.stages
        saving = self.checkpointing and self.training
        branch_map = None if self.branch is None else self.branch.start(images)
        for merge, stage in zip(self.merges, stages, strict=True):
            if len(levels) == 1:
                x = frozen(partial(_merged, merge), level).unflatten(0, lead)
                if self.depth_embedding is not None:
                    x = x + self.depth_embedding()[:, None, None]
            else:
                x = _merged(merge, level).unflatten(0, lead)
            for block in stage:
                x = recomputed(saving, block, x, self.slices_at_once)
            if self.branch is not None:
                x, branch_map = recomputed(saving, self.branch.exchange, len(levels), x, branch_map)
            levels.append(x)
            level = x.flatten(0, 1)
        if self.branch is not None:
            level = self.branch.fuse(x, branch_map).flatten(0, 1)
        return levels, apply_neck(self.neck, level).unflatten(0, lead)

    def _convolve(self, x: Tensor) -> Tensor:
        """Stem and first stage, (M, S_h, S_w, 3) to (M, 4 g_h, 4 g_w, 64)."""
        first, second = self.stem
        x = _convolved(second, _gelu(_convolved(first, x)))
        blocks: Any = self.convolutions
        for block in blocks:
            y = _convolved(block.conv2, _gelu(_convolved(block.conv1, x)))
            x = _gelu(_convolved(block.conv3, _gelu(y)) + x)
        return x


def _merged(merge: Any, x: Tensor) -> Tensor:
    """Half the height and width, except in the last merge: (M, h, w, E) to (M, h', w', E')."""
    x = _convolved(merge.conv2, _gelu(_convolved(merge.conv1, x)))
    return _convolved(merge.conv3, _gelu(x))


def _convolved(layer: Any, x: Tensor) -> Tensor:
    """A convolution with its batch norm in evaluation mode, channels last: (M, h, w, C) to (M, h', w', C')."""
    convolution, batch_norm = layer.conv, layer.bn
    gain = batch_norm.weight * (batch_norm.running_var + batch_norm.eps).rsqrt()
    weight, bias = convolution.weight * gain[:, None, None, None], batch_norm.bias - batch_norm.running_mean * gain
    if convolution.kernel_size == (1, 1):
        return F.linear(x, weight.flatten(1), bias)
    settings = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, *settings).permute(0, 2, 3, 1)


def _gelu(x: Tensor) -> Tensor:
    """In place where nothing needs x again."""
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)
