"""What the prompt generator drew, in pixels of the patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate


class Prompts(NamedTuple):
    """The prompts of each of the N queries of D slices, and what became of their classes."""

    probabilities: NDArray[np.float32]
    """(D, N, K + 1): of each of the network's output channels, "no object" last."""
    boxes: NDArray[np.float32]
    """(D, N, 4): x0 y0 x1 y1 in pixels of the patch, which they may leave where it is padded."""
    masks: NDArray[np.float32]
    """(D, N, H, W): auxiliary masks as probabilities."""


def read_prompts(parts: Any, padded: Sequence[int], plane: Sequence[int], num_heads: int) -> Prompts:
    """Turn a ``MaskSAMOutput`` of one volume into pixels of its patch.

    Args:
        parts: with the fields class_logits (1, D, N, K+1), aux_mask_logits (1, D, N, 4g_h, 4g_w) and aux_boxes
            (1, D, N, 4) in [0, 1] of the padded plane.
        padded: (H_p, W_p), size of that plane in pixels of the patch, which lies in its upper left corner.
        plane: (H, W) of the patch.
        num_heads: K.

    Raises:
        ValueError: if the output has not K + 1 classes.
    """
    probabilities = parts.class_logits[0].float().softmax(-1).cpu()
    if probabilities.shape[-1] != num_heads + 1:
        raise ValueError(
            f"the network has {probabilities.shape[-1]} classes, expected {num_heads + 1}: "
            f"{num_heads} and no object; was it trained on another dataset.json?"
        )
    height, width = (int(size) for size in padded)
    logits = interpolate(parts.aux_mask_logits[0].float().cpu(), size=(height, width), mode="bilinear")
    boxes = parts.aux_boxes[0].float().cpu() * torch.tensor([width, height, width, height])
    masks = logits[..., : plane[0], : plane[1]].sigmoid()
    return Prompts(probabilities.numpy(), boxes.numpy(), masks.numpy())
