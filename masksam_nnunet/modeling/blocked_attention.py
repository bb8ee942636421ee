"""SAM's attention with decomposed relative positions in blocks that stay in a CPU's cache.

The idea is FlashAttention's (arXiv 2205.14135): scores are made block by block, forward and backward, and only their
row-wise logarithms are kept. PyTorch's own such kernel knows no relative positions: folding them into queries and keys
triples its work for a 64x64 grid, which is dearer than the blocks' overhead here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**19
"""Scores made at once: 2 MiB in float32."""


def blocked_attention(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """softmax(scale q.k + q.R_h + q.R_w) v.

    Args:
        qkv: (B, h w, 3, heads, c).
        rows: R_h, (h, h, c): for the rows of query and key.
        columns: R_w, (w, w, c).
        scale: of the products of queries and keys.

    Returns:
        (B, h w, heads, c)
    """
    out: Tensor = _Blocked.apply(qkv, rows, columns, scale)
    return out


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        b, n, _, heads, c = qkv.shape
        out = qkv.new_empty(b, n, heads, c)
        logs = qkv.new_empty(b, heads, n)
        for images, some, (q, k, v) in _parts(qkv):
            scaled, by_row, by_column = _prepared(q, rows, columns, scale)
            part = torch.empty_like(q)
            sums = q.new_empty(len(q), n)
            for block, scores in _score_blocks(scaled, by_row, by_column, k):
                top = scores.amax(-1, keepdim=True)
                scores.sub_(top).exp2_()
                total = scores.sum(-1, keepdim=True)
                part[:, block] = torch.bmm(scores, v).div_(total)
                sums[:, block] = top.add_(total.log2_()).squeeze(-1)
            out[images, :, some] = part.unflatten(0, (-1, some.stop - some.start)).transpose(1, 2)
            logs[images, some] = sums.unflatten(0, (-1, some.stop - some.start))
        ctx.save_for_backward(qkv, rows, columns, out, logs)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rows, columns, out, logs = ctx.saved_tensors
        h, w = len(rows), len(columns)
        d_qkv = torch.empty_like(qkv)
        d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for images, some, (q, k, v) in _parts(qkv):
            scaled, by_row, by_column = _prepared(q, rows, columns, ctx.scale)
            d_out = gradient[images, :, some].transpose(1, 2).flatten(0, 1).contiguous()  # (m, n, c)
            own = (d_out * out[images, :, some].transpose(1, 2).flatten(0, 1)).sum(-1, keepdim=True)
            sums = logs[images, some].flatten(0, 1)[..., None]
            d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            d_by_row, d_by_column = torch.empty_like(by_row), torch.empty_like(by_column)
            d_scores = _scratch(q)
            for block, scores in _score_blocks(scaled, by_row, by_column, k):
                scores.sub_(sums[:, block]).exp2_()
                d_v.baddbmm_(scores.transpose(1, 2), d_out[:, block])
                change = d_scores[: scores.numel()].view(scores.shape)
                torch.bmm(d_out[:, block], v.transpose(1, 2), out=change)
                change.sub_(own[:, block]).mul_(scores)
                d_q[:, block] = torch.bmm(change, k)
                d_k.baddbmm_(change.transpose(1, 2), q[:, block])
                grid = change.unflatten(-1, (h, w))
                d_by_row[:, block] = grid.sum(-1)
                d_by_column[:, block] = grid.sum(-2)
            d_q *= ctx.scale
            d_k *= ctx.scale
            _add_positions(q, d_q, d_by_row, d_by_column, rows, columns, d_rows, d_columns, ctx.needs_input_grad)
            for index, part in enumerate((d_q, d_k, d_v)):
                d_qkv[images, :, index, some] = part.unflatten(0, (-1, some.stop - some.start)).transpose(1, 2)
        return d_qkv, d_rows, d_columns, None


def _parts(qkv: Tensor) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Images and heads whose scores fit a block (one head at least), and their q, k, v as (m, n, c)."""
    b, n, _, heads, _ = qkv.shape
    heads_at_once = min(heads, max(1, BLOCK // n**2))
    images_at_once = max(1, BLOCK // (heads * n**2))
    for image in range(0, b, images_at_once):
        for head in range(0, heads, heads_at_once):
            images = slice(image, min(image + images_at_once, b))
            some = slice(head, min(head + heads_at_once, heads))
            part = qkv[images, :, :, some].permute(2, 0, 3, 1, 4)  # (3, images, heads, n, c)
            yield images, some, part.flatten(1, 2).contiguous().unbind(0)


def _prepared(q: Tensor, rows: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (m, n, c) and their products with positions (m, n, h) and (m, n, w), all in units of log 2."""
    unit = math.log2(math.e)
    grid = q.unflatten(1, (len(rows), len(columns))) * unit
    by_row = torch.einsum("mhwc,hkc->mhwk", grid, rows).flatten(1, 2)
    by_column = torch.einsum("mhwc,wkc->mhwk", grid, columns).flatten(1, 2)
    return q * (scale * unit), by_row, by_column


def _add_positions(
    q: Tensor,
    d_q: Tensor,
    d_by_row: Tensor,
    d_by_column: Tensor,
    rows: Tensor,
    columns: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    wanted: tuple[bool, ...],
) -> None:
    """Gradients that come by way of the positions: added to those of queries and of the positions themselves."""
    grid = (len(rows), len(columns))
    by_row, by_column = d_by_row.unflatten(1, grid), d_by_column.unflatten(1, grid)
    change = torch.einsum("mhwk,hkc->mhwc", by_row, rows) + torch.einsum("mhwk,wkc->mhwc", by_column, columns)
    d_q += change.flatten(1, 2)
    if wanted[1]:
        d_rows += torch.einsum("mhwk,mhwc->hkc", by_row, q.unflatten(1, grid))
    if wanted[2]:
        d_columns += torch.einsum("mhwk,mhwc->wkc", by_column, q.unflatten(1, grid))


def _score_blocks(scaled: Tensor, by_row: Tensor, by_column: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Queries and their scores (m, some of n, n), in units of log 2; each overwrites the last one's."""
    m, n, _ = scaled.shape
    scratch = _scratch(scaled)
    step = max(1, BLOCK // (m * n))
    for first in range(0, n, step):
        block = slice(first, min(first + step, n))
        scores = scratch[: m * (block.stop - first) * n].view(m, -1, n)
        torch.bmm(scaled[:, block], k.transpose(1, 2), out=scores)
        grid = scores.unflatten(-1, (by_row.shape[-1], by_column.shape[-1]))
        grid += by_row[:, block, :, None]
        grid += by_column[:, block, None, :]
        yield block, scores


def _scratch(x: Tensor) -> Tensor:
    m, n, _ = x.shape
    return x.new_empty(m * n * min(n, max(1, BLOCK // (m * n))))
