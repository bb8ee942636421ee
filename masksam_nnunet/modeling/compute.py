"""How the network is computed: its number format, and what is recomputed in the backward pass instead of kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU has it, else float16 (which needs a gradient scaler); float32 off the GPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The autocast context that :func:`autocast_dtype` asks for."""
    dtype = autocast_dtype(device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; if active, its activations are computed again in the backward pass instead of kept."""
    if not active:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing here is random


def in_pieces(size: int | None, recompute: bool, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, computed for ``size`` entries of x at a time (None: all of them).

    If ``recompute``, only the inputs of pieces are kept for the backward pass. ``function`` must treat the entries of
    its input's first axis independently.
    """
    if size is None or len(x) <= size:
        return function(x)
    return torch.cat([recomputed(recompute, function, piece) for piece in x.split(size)])
