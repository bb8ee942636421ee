"""Activation checkpointing, as this network uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; if active, its activations are computed again in the backward pass instead of kept."""
    if not active:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing here is random


def in_pieces(size: int | None, recompute: bool, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, made of ``size`` entries of x at a time (None: all); if ``recompute``, pieces keep their inputs.

    ``function`` must treat the entries of its input's first axis apart.
    """
    if size is None or len(x) <= size:
        return function(x)
    return torch.cat([recomputed(recompute, function, piece) for piece in x.split(size)])
