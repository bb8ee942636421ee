"""SAM's embedding of mask prompts, short of its last layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .patchwise import norm, shrink


def mask_features(downscaling: nn.Sequential, masks: Tensor) -> Tensor:
    """What the last layer of SAM's ``mask_downscaling`` maps to P channels: (M, 4 g_h, 4 g_w) to (M, g_h, g_w, 16).

    Few channels hold all of a mask prompt, so they are what each query keeps.
    """
    layers: list[Any] = list(downscaling)
    first, norm_1, act_1, second, norm_2, act_2, _ = layers
    x = masks.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # (M, g_h, 4, g_w, 4)
    m, h, _, w, _ = x.shape
    x = x.permute(0, 1, 3, 2, 4).reshape(-1, 1, 4, 4)  # (M g_h g_w, 1, 4, 4)
    x = act_1(norm(norm_1, shrink(first, x)))  # (M g_h g_w, 2, 2, 4)
    weight = second.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as x has them
    x = F.linear(x.flatten(1), weight, second.bias)
    return act_2(norm(norm_2, x)).reshape(m, h, w, -1)


def dense_embedding(downscaling: nn.Sequential, features: Tensor) -> Tensor:
    """The last layer: (..., 16) to (..., P)."""
    last: Any = downscaling[-1]
    return F.linear(features, last.weight.flatten(1), last.bias)
