"""SAM's convolutions whose stride is their kernel, as linear maps of patches with the channels last.

Autograd keeps a convolution's input even where its weight is frozen; a linear map's it does not.
"""

from __future__ import annotations

import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from .compute import full_precision


def shrink(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """(M, C, h k, w k) to (M, h, w, C'), k being kernel and stride."""
    k = convolution.kernel_size[0]
    x = x.unflatten(-1, (-1, k)).unflatten(-3, (-1, k))  # (M, C, h, k, w, k)
    patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (M, h, w, C k k)
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias)


def grow(convolution: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """(..., C) to (..., k, k, C'): the patch that every vector becomes."""
    k = convolution.kernel_size[0]
    weight = convolution.weight.permute(2, 3, 1, 0)  # (k, k, C', C)
    bias = None if convolution.bias is None else convolution.bias.repeat(k * k)
    return F.linear(x, weight.flatten(0, 2), bias).unflatten(-1, (k, k, -1))


def norm(layer: LayerNorm2d, x: Tensor) -> Tensor:
    """segment-anything's norm over channels, for (..., C); at least float32, as autocast has it on CUDA."""
    return F.layer_norm(full_precision(x), layer.weight.shape, layer.weight, layer.bias, layer.eps)
