"""How the network is computed: its number format, and what is recomputed in the backward pass or never kept."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
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


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of giving that of each large tensor back; for trainings on a CPU.

    Else every step gets fresh pages from the system, which takes time. No effect under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # constants of malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation has pages of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


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


def shrink(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, k, as a linear map of patches: (M, C, h k, w k) to (M, h, w, C').

    Autograd keeps a convolution's input even where its weight is frozen; a linear map's it does not.
    """
    k = convolution.kernel_size[0]
    x = x.unflatten(-1, (-1, k)).unflatten(-3, (-1, k))  # (M, C, h, k, w, k)
    patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (M, h, w, C k k)
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias)


def grow(convolution: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution, likewise: (..., C) to (..., k, k, C'), the patch that every vector becomes."""
    k = convolution.kernel_size[0]
    weight = convolution.weight.permute(2, 3, 1, 0)  # (k, k, C', C)
    bias = None if convolution.bias is None else convolution.bias.repeat(k * k)
    return F.linear(x, weight.flatten(0, 2), bias).unflatten(-1, (k, k, -1))


def norm(layer: LayerNorm2d, x: Tensor) -> Tensor:
    """segment-anything's norm over channels, for (..., C); at least float32, as autocast has it on CUDA."""
    return F.layer_norm(full_precision(x), layer.weight.shape, layer.weight, layer.bias, layer.eps)


def apply_neck(layers: Any, x: Tensor) -> Tensor:
    """SAM's neck, [1x1 convolution, norm, 3x3 convolution, norm], of an encoder: (M, h, w, E) to (M, P, h, w)."""
    project, norm_1, convolution, norm_2 = layers
    x = norm(norm_1, shrink(project, x.permute(0, 3, 1, 2)))  # (M, h, w, P)
    x = convolution(x.permute(0, 3, 1, 2))
    return norm(norm_2, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
