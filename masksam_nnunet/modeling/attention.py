"""The attention of SAM's encoder and mask decoder, computed exactly but without large matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from segment_anything.modeling.transformer import Attention as CrossAttention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

CHUNK = 2**21
"""Scores computed at once on a CPU: 8 MiB in float32."""


def self_attention(attention: Attention, x: Tensor) -> Tensor:
    """What ``attention(x)`` of segment-anything gives, for x (B, h, w, E): attention with relative positions."""
    b, h, w, _ = x.shape
    qkv = attention.qkv(x).reshape(b, h * w, 3, attention.num_heads, -1)  # (B, h w, 3, heads, c), c = E/heads
    rows, columns = relative_vectors(attention, h, w, qkv.dtype)
    on_cpu = qkv.device.type == "cpu" and qkv.dtype in (torch.float32, torch.float64)
    # A compiler would unroll the chunks.
    compute = chunked_attention if on_cpu and not torch.compiler.is_compiling() else fused_attention
    out = compute(qkv, rows, columns, attention.scale)  # (B, h w, heads, c)
    return attention.proj(out.reshape(b, h, w, -1))


def relative_vectors(attention: Attention, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """R_h (h, h, c) and R_w (w, w, c) of an attention layer."""
    return _relative(h, attention.rel_pos_h).to(dtype), _relative(w, attention.rel_pos_w).to(dtype)


def _relative(size: int, table: Tensor) -> Tensor:
    """The (size, size, c) vectors for query and key, from those for their distances (2 size - 1, c).

    segment-anything's ``get_rel_pos`` looks them up by an index on the CPU, for which a GPU would be waited for.
    """
    if len(table) != 2 * size - 1:
        return get_rel_pos(size, size, table)
    return table.unfold(0, size, 1).flip(-1).transpose(1, 2)


def chunked_attention(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """softmax(scale q.k + q.R_h + q.R_w) v, for a few heads and queries at a time, whose scores stay in a CPU's cache.

    On a CPU this is faster than the fused attention, where the longer vectors cost more.

    Args:
        qkv: (B, h w, 3, heads, c).
        rows: R_h, (h, h, c): for the rows of query and key.
        columns: R_w, (w, w, c).
        scale: of the products of queries and keys.

    Returns:
        (B, h w, heads, c)
    """
    b, n, _, heads, _ = qkv.shape
    size = max(1, CHUNK // (4 * n**2))  # heads at once: whole ones are quickest in a quarter
    step = max(1, CHUNK // (size * n))  # queries at once
    by_heads = (x.flatten(0, 1).split(size) for x in qkv.permute(2, 0, 3, 1, 4))  # (m, h w, c) each
    out = []
    for q, k, v in zip(*by_heads, strict=True):
        grid = q.unflatten(1, (len(rows), len(columns)))
        to_rows = torch.einsum("mhwc,hkc->mhwk", grid, rows).flatten(1, 2).split(step, dim=1)  # (m, n', h)
        to_columns = torch.einsum("mhwc,wkc->mhwk", grid, columns).flatten(1, 2).split(step, dim=1)
        for some_q, to_row, to_column in zip((q * scale).split(step, dim=1), to_rows, to_columns, strict=True):
            out.append(_Chunk.apply(some_q, k, v, to_row, to_column))
    return torch.cat([x.flatten(0, 1) for x in out]).view(b, heads, n, -1).transpose(1, 2)


class _Chunk(torch.autograd.Function):
    """softmax(q.k + r) v for queries (m, n', c), keys and values (m, n, c), without keeping the scores (m, n', n).

    r, from positions, is given as (m, n', h) and (m, n', w). Of the scores only the logarithm
    of each row's sum is kept, as in FlashAttention (arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
        shares = _scores(q, k, to_rows, to_columns)
        top = shares.amax(-1, keepdim=True)
        total = shares.sub_(top).exp_().sum(-1, keepdim=True)
        out = (shares @ v).div_(total)
        ctx.save_for_backward(q, k, v, to_rows, to_columns, out, top.add_(total.log_()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, to_rows, to_columns, out, log_sum = ctx.saved_tensors
        shares = _scores(q, k, to_rows, to_columns).sub_(log_sum).exp_()
        d_scores = (d_out @ v.transpose(1, 2)).sub_((d_out * out).sum(-1, keepdim=True)).mul_(shares)
        grid = d_scores.unflatten(-1, (to_rows.shape[-1], to_columns.shape[-1]))
        d_v = shares.transpose(1, 2) @ d_out
        return d_scores @ k, d_scores.transpose(1, 2) @ q, d_v, grid.sum(-1), grid.sum(-2)


def _scores(q: Tensor, k: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)  # (m, n', n)
    grid = scores.unflatten(-1, (to_rows.shape[-1], to_columns.shape[-1]))
    grid += to_rows[..., None]
    grid += to_columns[..., None, :]
    return scores


def fused_attention(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """As :func:`chunked_attention`, by PyTorch's fused attention.

    scale q.k + q.R_h + q.R_w is one dot product of longer vectors: queries are extended by their products with R_h and
    R_w, keys by one-hot codes of their row and column.
    """
    q, k, v = extended(qkv, rows, columns, scale)
    size = v.shape[-1]
    if not _takes_short_values(q, k):  # else PyTorch would leave the fused path
        v = F.pad(v, (0, q.shape[-1] - size))
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :size]  # (B, heads, h w, c)
    return out.transpose(1, 2)


def _takes_short_values(q: Tensor, k: Tensor) -> bool:
    """Whether PyTorch takes its memory-efficient kernel, whose values may be shorter than queries and keys.

    It does on GPUs before Ampere, and on small Ampere and Ada ones for long vectors.
    """
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return bool(torch._fused_sdp_choice(q, k, k) == SDPBackend.EFFICIENT_ATTENTION.value)


def extended(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (B, heads, h w, c'), whose dot products hold the positions, and values (B, heads, h w, c)."""
    b, _, _, heads, size = qkv.shape
    h, w = len(rows), len(columns)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, h w, c)
    to_rows, to_columns = relative_scores(q, rows, columns)
    codes = torch.cat(
        [
            torch.eye(h, dtype=q.dtype, device=q.device).repeat_interleave(w, 0),
            torch.eye(w, dtype=q.dtype, device=q.device).repeat(h, 1),
        ],
        dim=-1,
    )  # (h w, h + w)
    pad = -(size + h + w) % 8  # fused kernels want multiples of 8
    q = torch.cat([q * scale, to_rows, to_columns], dim=-1)
    k = torch.cat([k, codes.expand(b, heads, -1, -1)], dim=-1)
    if pad:
        q, k = F.pad(q, (0, pad)), F.pad(k, (0, pad))
    return q, k, v


def relative_scores(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """q.R_h (B, heads, h w, h) and q.R_w (B, heads, h w, w), for q (B, heads, h w, c)."""
    grid = q.unflatten(2, (len(rows), len(columns)))
    to_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)
    return to_rows, torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)


def decoder_attention(
    attention: CrossAttention, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor | None = None
) -> Tensor:
    """What ``attention(q, k, v)`` of segment-anything's decoder gives; q (B, n, P), k and v (B, m, P).

    ``log_weights`` (B, n, m): logarithms of factors of the shares, which are normalised again.
    """

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, heads, n, P'/heads)

    q, k, v = heads(attention.q_proj(q)), heads(attention.k_proj(k)), heads(attention.v_proj(v))
    mask = None if log_weights is None else log_weights[:, None].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))  # (B, n, P)


def token_to_image(attention: CrossAttention, tokens: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """What ``attention(q=tokens, k=image + positions, v=image)`` of segment-anything gives.

    Projections are on the tokens' side: (W_q t)·(W_k x) = (W_k' W_q t)·x. With T tokens and H heads, T H vectors take
    the place of a projection of every pixel, which pays where T H is less than the projection is wide. What positions
    add is the same for all queries of a slice, and is computed once.

    Args:
        attention: of the mask decoder.
        tokens: (M, D, T, P), their own positions added.
        image: (M, D, n, P).
        positions: (D, n, P).

    Returns:
        (M, D, T, P)
    """
    q = _heads(attention, attention.q_proj(tokens))  # (M, D, T, H, c)
    q = q * q.shape[-1] ** -0.5
    scores = torch.einsum("mdthc,dnhc->mdhtn", q, _heads(attention, attention.k_proj(positions))).flatten(2, 3)
    wanted = torch.einsum("mdthc,hcp->mdhtp", q, _weight(attention, attention.k_proj)).flatten(2, 3)  # (M, D, H T, P)
    shares = _softmax(scores + wanted @ image.transpose(-1, -2))  # (M, D, H T, n)
    mixed = (shares @ image).unflatten(2, (attention.num_heads, -1))  # (M, D, H, T, P)
    out = torch.einsum("mdhtp,hcp->mdthc", mixed, _weight(attention, attention.v_proj)).flatten(-2)
    return attention.out_proj(out + attention.v_proj.bias)


def image_to_token(attention: CrossAttention, image: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What ``attention(q=image + positions, k=keys, v=values)`` of segment-anything gives, as :func:`token_to_image`.

    Args:
        attention: of the mask decoder.
        image: (M, D, n, P).
        positions: (D, n, P).
        keys: (M, D, T, P), with their positions.
        values: (M, D, T, P).

    Returns:
        (M, D, n, P)
    """
    k = _heads(attention, attention.k_proj(keys))  # (M, D, T, H, c)
    k = k * k.shape[-1] ** -0.5
    scores = torch.einsum("dnhc,mdthc->mdnht", _heads(attention, attention.q_proj(positions)), k)
    wanted = torch.einsum("mdthc,hcp->mdhtp", k, _weight(attention, attention.q_proj)).flatten(2, 3)  # (M, D, H T, P)
    scores = scores + (image @ wanted.transpose(-1, -2)).unflatten(-1, scores.shape[-2:])
    shares = _softmax(scores).flatten(-2)  # (M, D, n, H T)
    v = _heads(attention, attention.v_proj(values))
    offered = torch.einsum("mdthc,phc->mdhtp", v, attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)))
    return shares @ offered.flatten(2, 3) + attention.out_proj.bias


def _softmax(scores: Tensor) -> Tensor:
    """In the precision of its input: a GPU's autocast would keep a float32 copy, to be rounded for the next product."""
    return scores.softmax(-1, dtype=scores.dtype)


def _heads(attention: CrossAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, -1))


def _weight(attention: CrossAttention, projection: nn.Linear) -> Tensor:
    return projection.weight.unflatten(0, (attention.num_heads, -1))  # (H, c, P)
