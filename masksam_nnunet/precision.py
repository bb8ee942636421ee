"""Which number format the network runs in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


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
