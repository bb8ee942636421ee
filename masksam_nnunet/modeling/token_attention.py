"""Attention between a few tokens and an image, projected on the tokens' side (used by SAM's mask decoder).

(W_q t)·(W_k x) = (W_k' W_q t)·x: with T tokens and H heads, T H vectors take the place of a projection of every pixel,
which pays where T H is less than the projection is wide. What positions add is the same for all queries of a slice,
and is computed once.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn


def token_to_image(attention: Attention, tokens: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """What ``attention(q=tokens, k=image + positions, v=image)`` of segment-anything gives.

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


def image_to_token(attention: Attention, image: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What ``attention(q=image + positions, k=keys, v=values)`` of segment-anything gives.

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


def _heads(attention: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, -1))


def _weight(attention: Attention, projection: nn.Linear) -> Tensor:
    return projection.weight.unflatten(0, (attention.num_heads, -1))  # (H, c, P)
