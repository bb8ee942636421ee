"""SAM's image encoder over the slices of a volume, with adapters that connect the slices."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import Grid, MaskSAMConfig
from ..method import find_method
from .adapters import Before, adapters_before
from .attention import self_attention
from .blocks import DepthEmbedding
from .compute import apply_neck, in_pieces, recomputed, shrink
from .weight_deltas import change_projections

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # SAM's


class AdaptedBlock(Block):
    """A block of SAM's ViT with two adapters: one follows the attention, one runs parallel to the MLP.

    Adapters see the whole grid, after windows are merged, so that their depth axis is neighbouring slices. Other
    methods have theirs before the attention and before the MLP.
    """

    def __init__(
        self, backbone: Backbone, is_global: bool, tokens: tuple[int, int], ratio: float, before: Before = None
    ) -> None:
        super().__init__(
            backbone.width,
            backbone.heads,
            norm_layer=LayerNorm,
            use_rel_pos=True,
            window_size=0 if is_global else backbone.window,
            input_size=tokens,
        )
        self.attention_adapter = backbone.make_adapter(backbone.width, ratio)
        self.mlp_adapter = backbone.make_adapter(backbone.width, ratio)
        self.before = adapters_before(backbone.width, before)

    def forward(self, x: Tensor, slices_at_once: int | None, recompute_adapters: bool) -> Tensor:
        """The adapted block; x and the result are (B, D, g_h, g_w, E)."""
        lead = x.shape[:2]
        pieces = partial(in_pieces, slices_at_once, self.training)
        if self.before is not None:
            x = x + recomputed(recompute_adapters, self.before[0], x)
        y = pieces(self._attend, self.norm1(x).flatten(0, 1)).unflatten(0, lead)
        x = x + y + recomputed(recompute_adapters, self.attention_adapter, y)
        if self.before is not None:
            x = x + recomputed(recompute_adapters, self.before[1], x)
        y = self.norm2(x)
        mlp = pieces(self.mlp, y.flatten(0, 1)).unflatten(0, lead)
        return x + mlp + 0.5 * recomputed(recompute_adapters, self.mlp_adapter, y)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention in windows or over the whole grid, (M, g_h, g_w, E)."""
        if self.window_size == 0:
            return self_attention(self.attn, x)
        windows, padded = window_partition(x, self.window_size)
        return window_unpartition(self_attention(self.attn, windows), self.window_size, padded, x.shape[1:3])


class AdaptedImageEncoder(ImageEncoderViT):
    """SAM's ViT with what the config's method adds to it. Its own parameters have SAM's names."""

    takes_adaptations = True

    def __init__(self, backbone: Backbone, config: MaskSAMConfig) -> None:
        grid = Grid.of(config)
        super().__init__(
            img_size=16,
            embed_dim=backbone.width,
            depth=0,
            num_heads=backbone.heads,
            out_chans=backbone.prompt_width,
            norm_layer=LayerNorm,
            use_rel_pos=True,
        )
        self.img_size = max(grid.image)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid.tokens, backbone.width))
        nn.init.normal_(self.pos_embed, std=0.02)
        adaptation = find_method(config.method).adaptation
        self.blocks = nn.ModuleList(
            AdaptedBlock(
                backbone, index in backbone.global_blocks, grid.tokens, config.encoder_ratio, adaptation.before
            )
            for index in range(backbone.depth)
        )
        attentions = [block.attn for block in self.blocks]
        if adaptation.delta is not None:
            self.shared = change_projections(attentions, adaptation.delta, interleaved=False)
        self.branch = adaptation.branch(backbone) if adaptation.branch is not None else None
        self.depth_embedding = DepthEmbedding(grid.patch[0], backbone.width) if adaptation.depth_embedding else None
        self.global_blocks = backbone.global_blocks
        self.checkpointing = config.checkpointing
        # Where blocks are not recomputed, adapters are: a twentieth of a block's work, a third of what it would keep.
        self.recompute_adapters = config.sam is not None and not config.checkpointing
        self.slices_at_once: int | None = None
        """How many of a batch's B·D slices SAM's frozen layers take at a time; None for all.

        What they would keep is then computed once more, in addition to what ``checkpointing`` does.
        """

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode images (B, D, 3, S_h, S_w).

        Returns:
            The outputs of the global-attention blocks, shallow to deep, each (B, D, g_h, g_w, E), and the neck's output
            (B, D, P, g_h, g_w).
        """
        lead = images.shape[:2]
        x = shrink(self.patch_embed.proj, images.flatten(0, 1)) + self.pos_embed  # (B D, g_h, g_w, E)
        x = x.unflatten(0, lead)
        if self.depth_embedding is not None:
            x = x + self.depth_embedding()[:, None, None]
        branch_map = None if self.branch is None else self.branch.start(images)
        levels: list[Tensor] = []
        saving = self.checkpointing and self.training
        for index, block in enumerate(self.blocks):
            adapters_again = self.recompute_adapters and self.training
            x = recomputed(saving, block, x, self.slices_at_once, adapters_again)
            if index in self.global_blocks:
                if self.branch is not None:
                    x, branch_map = recomputed(saving, self.branch.exchange, len(levels), x, branch_map)
                levels.append(x)
        if self.branch is not None:
            x = self.branch.fuse(x, branch_map)
        return levels, apply_neck(self.neck, x.flatten(0, 1)).unflatten(0, lead)
