"""Activation checkpointing, as this network uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; if active, its activations are computed again in the backward pass instead of kept."""
    if not active:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
