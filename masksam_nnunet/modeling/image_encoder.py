"""SAM's image encoder over the slices of a volume, with adapters that connect the slices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from .adapters import DConvAdapter
from .attention import self_attention
from .patchwise import norm, shrink
from .recompute import in_pieces, recomputed
from .trainable import DepthEmbedding, Trainable


class BlockAdapters(nn.Module):
    """The two adapters of one transformer block, which ``forward`` runs with them.

    Adapters see the whole grid, after windows are merged: so their depth axis is neighbouring slices.
    """

    def __init__(self, width: int, ratio: float, recompute: bool, adapter: Callable[[int, float], Trainable]) -> None:
        super().__init__()
        self.recompute = recompute  # a twentieth of a block's work, a third of what it would keep
        self.attention = adapter(width, ratio)
        self.mlp = adapter(width, ratio)

    def forward(self, block: Block, x: Tensor, slices_at_once: int | None = None) -> Tensor:
        """One SAM block, adapted; x and the result are (B, D, g_h, g_w, E)."""
        lead = x.shape[:2]
        pieces = partial(in_pieces, slices_at_once, self.training)
        y = pieces(partial(_attended, block), block.norm1(x).flatten(0, 1))  # (B D, g_h, g_w, E)
        y = y.unflatten(0, lead)
        again = self.recompute and self.training
        x = x + y + recomputed(again, self.attention, y)
        y = block.norm2(x)
        return x + pieces(block.mlp, y.flatten(0, 1)).unflatten(0, lead) + 0.5 * recomputed(again, self.mlp, y)


def _attended(block: Block, x: Tensor) -> Tensor:
    """A block's attention, (M, g_h, g_w, E)."""
    if block.window_size == 0:
        return self_attention(block.attn, x)
    windows, padded = window_partition(x, block.window_size)
    return window_unpartition(self_attention(block.attn, windows), block.window_size, padded, x.shape[1:3])


class AdaptedImageEncoder(nn.Module):
    """SAM's frozen ViT with a depth embedding and two adapters a block.

    ``forward`` takes images (B, D, 3, S_h, S_w) and returns the outputs of the global-attention blocks, shallow to
    deep, each (B, D, g_h, g_w, E), and the neck's output (B, D, P, g_h, g_w).

    Args:
        sam: the ViT.
        taps: blocks whose outputs are returned.
        depth: D.
        adapter_ratio: width of the adapters' bottleneck.
        checkpointing: compute blocks again in the backward pass, and keep their inputs only.
        recompute_adapters: where blocks are not, compute adapters again.
        adapter: makes an adapter from width and ratio.
    """

    def __init__(
        self,
        sam: ImageEncoderViT,
        taps: tuple[int, ...],
        depth: int,
        adapter_ratio: float = 0.25,
        checkpointing: bool = False,
        recompute_adapters: bool = False,
        adapter: Callable[[int, float], Trainable] = DConvAdapter,
    ) -> None:
        super().__init__()
        width = sam.pos_embed.shape[-1]
        recompute = recompute_adapters and not checkpointing  # of whole blocks, else of adapters
        self.sam = sam
        self.taps = taps
        self.checkpointing = checkpointing
        self.slices_at_once: int | None = None
        """Of a batch's B·D slices, how many SAM's frozen layers take at a time; None for all.

        What they would keep is then computed once more, beside what ``checkpointing`` does.
        """
        self.depth_embedding = DepthEmbedding(depth, width)
        self.adapters = nn.ModuleList(BlockAdapters(width, adapter_ratio, recompute, adapter) for _ in sam.blocks)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        b, d = images.shape[:2]
        x = shrink(self.sam.patch_embed.proj, images.flatten(0, 1)) + self.sam.pos_embed  # (B D, g_h, g_w, E)
        x = x.unflatten(0, (b, d)) + self.depth_embedding()[:, None, None]
        levels = []
        for index, (block, adapters) in enumerate(zip(self.sam.blocks, self.adapters, strict=True)):
            x = recomputed(self.checkpointing and self.training, adapters, block, x, self.slices_at_once)
            if index in self.taps:
                levels.append(x)
        project, norm_1, convolution, norm_2 = self.sam.neck
        neck = norm(norm_1, shrink(project, x.flatten(0, 1).permute(0, 3, 1, 2)))  # (B D, g_h, g_w, P)
        neck = convolution(neck.permute(0, 3, 1, 2))
        neck = norm(norm_2, neck.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B D, P, g_h, g_w)
        return levels, neck.unflatten(0, (b, d))
