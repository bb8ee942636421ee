"""How sure a model is of each voxel, in bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Measured(NamedTuple):
    """What folds predict together, and how sure they are."""

    logits: Tensor
    """(K, D, H, W): the mean over folds, in float16, as nnU-Net has it."""
    entropy: NDArray[np.float32]
    """(D, H, W): entropy of the mean of the folds' probabilities."""
    disagreement: NDArray[np.float32] | None
    """(D, H, W): mutual information of class and fold, the part of the entropy that folds do not share; None for one
    fold."""


@torch.inference_mode()
def measure(folds: Iterable[Tensor], regions: bool) -> Measured:
    """Measure what ``folds`` predict.

    Args:
        folds: for each fold (K, D, H, W), whose softmax (sigmoid for regions) are probabilities.
        regions: whether the K are overlapping regions. Each then has an entropy of its own, and a voxel that of its
            least certain region.
    """
    total: Tensor | None = None
    mean: Tensor | None = None
    shared: Tensor | None = None
    count = 0
    for logits in folds:
        probabilities = _probabilities(logits, regions)
        own = _entropy(probabilities, regions)
        if total is None or mean is None or shared is None:
            total, mean, shared = logits.clone(), probabilities, own
        else:
            total += logits
            mean += probabilities
            shared += own
        count += 1
        del logits, probabilities, own
    if total is None or mean is None or shared is None:
        raise ValueError("no fold to measure")
    if count == 1:
        return Measured(total, _largest(shared).numpy(), None)
    total /= count
    entropy = _entropy(mean.div_(count), regions)
    disagreement = (entropy - shared.div_(count)).clamp_(min=0)  # below 0 by rounding only
    return Measured(total, _largest(entropy).numpy(), _largest(disagreement).numpy())


def _probabilities(logits: Tensor, regions: bool) -> Tensor:
    return logits.float().sigmoid_() if regions else logits.float().softmax(0)


def _entropy(p: Tensor, regions: bool) -> Tensor:
    """(K or 1, D, H, W) bits. Slice by slice: whole volumes of many classes do not fit twice."""
    result = torch.empty((len(p) if regions else 1, *p.shape[1:]))
    for index in range(p.shape[1]):
        here = p[:, index]
        bits = torch.special.entr(here)
        bits = bits + torch.special.entr(1 - here) if regions else bits.sum(0, keepdim=True)
        result[:, index] = bits / np.log(2)
    return result


def _largest(bits: Tensor) -> Tensor:
    return bits.amax(0)
