"""What nnU-Net's float16 accumulation may do to a prediction."""

from __future__ import annotations

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

STEP = 2.0**-24  # the smallest float16
RELATIVE = 2.0**-10  # twice its rounding error: product and sum


def probability_tolerance(logits: Tensor, patch_size: tuple[int, ...], use_gaussian: bool = True) -> Tensor:
    """Largest error of softmax(logits) (K, D, H, W) of one window that nnU-Net weighs, adds and divides in float16.

    At a window's corners the Gaussian is smaller than float16's normal numbers, and a weighted logit is rounded to few
    of its smallest steps: whatever the network.
    """
    weight = compute_gaussian(
        tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
    ).float()
    smallest = STEP / weight if use_gaussian else torch.zeros(1)
    error = (logits.abs() * RELATIVE + smallest).amax(0, keepdim=True)
    return 2 * error + 1e-3
