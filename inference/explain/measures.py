"""What the page states in numbers: how sure the model is, which slices to show, what each query does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..label_maps import Classes
from .inside import SliceQueries

SHOWN = 12
"""Most queries that are drawn for a slice."""
LEAST_SHARE = 0.01
"""Smallest share of a slice's foreground score with which a query contributes."""


class Uncertainty(NamedTuple):
    """What folds predict together, and how sure they are."""

    logits: Tensor  # (K, D, H, W), the mean over folds
    entropy: NDArray[np.float32]  # (D, H, W), in bits, of the folds' mean probabilities
    disagreement: NDArray[np.float32] | None  # (D, H, W), mutual information of class and fold in bits


@torch.inference_mode()
def measure_uncertainty(folds: Iterable[Tensor], regions: bool) -> Uncertainty:
    """Measure what ``folds``, logits (K, D, H, W) of each, predict; only one of them is in memory at a time.

    With ``regions`` each of the K has its own entropy, and a voxel has that of its least certain region.
    """
    total = mean = own = torch.empty(0)
    count = 0
    for logits in folds:
        p = logits.float().sigmoid() if regions else logits.float().softmax(0)
        if count:
            total += logits
            mean += p
            own += _entropy(p, regions)
        else:
            total, mean, own = logits.clone(), p, _entropy(p, regions)
        count += 1
        del logits, p
    if count == 1:
        return Uncertainty(total, own.amax(0).numpy(), None)
    entropy = _entropy(mean.div_(count), regions)
    disagreement = (entropy - own.div_(count)).clamp_(min=0)  # below 0 by rounding only
    return Uncertainty(total.div_(count), entropy.amax(0).numpy(), disagreement.amax(0).numpy())


def _entropy(p: Tensor, regions: bool) -> Tensor:
    """(K or 1, D, H, W) bits. Slice by slice: whole volumes of many classes do not fit twice."""
    result = torch.empty((len(p) if regions else 1, *p.shape[1:]))
    for index in range(p.shape[1]):
        here = p[:, index]
        bits = torch.special.entr(here)
        bits = bits + torch.special.entr(1 - here) if regions else bits.sum(0, keepdim=True)
        result[:, index] = bits / np.log(2)
    return result


def spread_slices(
    foreground: NDArray[np.integer[Any]], entropy: NDArray[np.floating[Any]], count: int = 4
) -> list[int]:
    """Choose slices with much foreground and entropy, both (S,): the best of each of ``count`` parts of the object."""
    candidates = np.flatnonzero(foreground) if foreground.any() else np.arange(len(foreground))
    score = sum(values / max(values.max(), 1e-9) for values in (foreground, entropy))
    stretches = np.array_split(candidates, min(count, len(candidates)))
    return [int(stretch[np.argmax(score[stretch])]) for stretch in stretches]


def query_table(queries: SliceQueries, label: NDArray[np.integer[Any]] | None, classes: Classes) -> pd.DataFrame:
    """Tabulate what each query does in a slice with ``label`` (H, W), those with the largest share first.

    Only the part of the window in the volume counts. ``number`` counts from 1; ``class_name`` is the likeliest class
    other than "no object"; ``kept`` says whether it is likelier than that; ``box`` is x0 y0 x1 y1 on the network's
    grid; ``draft_iou`` is the IoU of auxiliary and final mask, ``label_iou`` that of final mask and label, NaN where
    undefined; ``share`` is of the slice's foreground score, the sum of class probability times mask; ``contributes``
    means at least :data:`LEAST_SHARE`; ``shown`` that the query is drawn.
    """
    heads, no_object = queries.probabilities[:, :-1], queries.probabilities[:, -1]
    scores = heads[:, 0 if classes.has_regions else 1 :].sum(1) * queries.masks[:, *queries.inside].sum((1, 2), float)
    shares = scores / scores.sum() if scores.sum() > 0 else scores
    drafts, masks = (part[:, *queries.inside] > 0.5 for part in (queries.drafts, queries.masks))
    names = [classes.heads[best] for best in heads.argmax(1)]
    label_ious = [math.nan] * len(names)
    if label is not None:
        here = label[queries.plane]
        counted = here != classes.ignore_label
        wanted = [np.isin(here, classes.foreground.get(name, (0,))) for name in names]
        label_ious = [_iou(mask & counted, truth & counted) for mask, truth in zip(masks, wanted, strict=True)]
    _, row, column = queries.corner
    table = pd.DataFrame(
        {
            "number": np.arange(1, len(names) + 1),
            "class_name": names,
            "probability": heads.max(1),
            "no_object": no_object,
            "kept": heads.max(1) > no_object,
            "box": (queries.boxes + np.array([column, row, column, row], np.float32)).tolist(),
            "draft_pixels": drafts.sum((1, 2)),
            "mask_pixels": masks.sum((1, 2)),
            "draft_iou": [_iou(draft, mask) for draft, mask in zip(drafts, masks, strict=True)],
            "label_iou": label_ious,
            "share": shares,
            "contributes": shares >= LEAST_SHARE,
        }
    )
    table = table.iloc[np.lexsort((table["number"], no_object, -shares.round(6)))]
    return table.assign(shown=np.arange(len(table)) < SHOWN)


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else math.nan
