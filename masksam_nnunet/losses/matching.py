"""One-to-one assignment of queries to targets (DETR, arXiv 2005.12872; costs as in Mask2Former, arXiv 2112.01527)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..config import LossConfig
from ..modeling.geometry import generalised_iou
from .masks import PairSums
from .targets import Targets

IMPOSSIBLE = 1e6  # in place of NaN and infinities, which scipy refuses


@dataclass(frozen=True)
class Matches:
    """M matched pairs; all fields are (M,) int64."""

    slices: Tensor
    queries: Tensor
    targets: Tensor

    @classmethod
    def of_classes(cls, targets: Targets) -> Matches:
        """Each target with the one query of its class."""
        slices, columns = targets.present.nonzero(as_tuple=True)
        return cls(slices, targets.classes[slices, columns], columns)


@torch.no_grad()
def match(cost: Tensor, targets: Targets, depth: int, matching: str) -> Matches:
    """The assignment of least cost, for each slice or, with ``matching`` "volume", for each volume.

    With "class", for each slice among the queries of each class.

    Costs and classes go to the host in one copy, pairs come back in one.

    Args:
        cost: of every query for every target of its slice, (S, N, T).
        targets: the targets of the same slices.
        depth: D, slices of a volume.
        matching: as in :class:`MaskSAMConfig`.
    """
    cost = cost.nan_to_num(IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE)
    shapes = cost.shape, targets.classes.shape
    table = torch.cat([cost.flatten(), targets.classes.flatten().to(cost.dtype)]).cpu().numpy()
    costs, classes = (part.reshape(shape) for part, shape in zip(np.split(table, [cost.numel()]), shapes, strict=True))
    if matching == "class":
        owner = np.arange(costs.shape[1]) // (costs.shape[1] // targets.num_classes)
        costs = costs + IMPOSSIBLE * (owner[:, None] != classes[:, None])
    assign = _by_volume if matching == "volume" else _by_slice
    pairs = assign(costs, classes.astype(np.int64), targets.num_classes, depth)
    return Matches(*torch.from_numpy(pairs).to(cost.device))


def _by_slice(costs: np.ndarray, classes: np.ndarray, num_classes: int, _: int) -> np.ndarray:
    """Slices, queries and targets of the pairs, (3, M), from costs (S, N, T) and classes (S, T)."""
    pairs = [np.zeros((3, 0), np.int64)]
    for index, cost in enumerate(costs):
        columns = np.flatnonzero(classes[index] < num_classes)
        query, column = linear_sum_assignment(cost[:, columns])
        pairs.append(np.stack([np.full_like(query, index), query, columns[column]]))
    return np.concatenate(pairs, axis=1)


def _by_volume(costs: np.ndarray, classes: np.ndarray, num_classes: int, depth: int) -> np.ndarray:
    """As :func:`_by_slice`, but a query has one class in all slices of a volume: costs are summed over them."""
    pairs = [np.zeros((3, 0), np.int64)]
    for first in range(0, len(costs), depth):
        held = classes[first : first + depth]  # (D, T)
        d, t = np.nonzero(held < num_classes)
        total = np.zeros((num_classes, costs.shape[1]))
        np.add.at(total, held[d, t], costs[first + d, :, t])
        present = np.unique(held[d, t])
        row, query = linear_sum_assignment(total[present])
        query_of = np.full(num_classes, -1)
        query_of[present[row]] = query
        found = query_of[held[d, t]]
        kept = found >= 0
        pairs.append(np.stack([first + d, found, t])[:, kept])
    return np.concatenate(pairs, axis=1)


@torch.no_grad()
def pairwise_cost(
    class_logits: Tensor, boxes: Tensor, masks: PairSums, aux_masks: PairSums, targets: Targets, loss: LossConfig
) -> Tensor:
    """Cost of every query for every target of its slice, (S, N, T).

    Args:
        class_logits: (S, N, K + 1).
        boxes: (S, N, 4).
        masks, aux_masks: comparisons of all pairs, (S, N, T).
        targets: of the same slices.
        loss: the weights.
    """
    probabilities = class_logits.softmax(-1)
    columns = targets.classes[:, None].expand(-1, probabilities.shape[1], -1)
    cost = -loss.class_weight * probabilities.gather(2, columns)
    cost = cost + loss.mask_bce * masks.entropy + loss.mask_dice * masks.dice_loss
    cost = cost + loss.aux_bce * aux_masks.entropy + loss.aux_dice * aux_masks.dice_loss
    a, b, whole = boxes[:, :, None], targets.boxes[:, None], targets.whole[:, None, None]  # (S, N, 1, 4), (S, 1, T, 4)
    cost = cost + loss.box_giou * (1 - generalised_iou(a, b)) * whole
    return cost + loss.box_l1 * box_distance(a, b, whole).sum(-1)


def box_distance(boxes: Tensor, targets: Tensor, whole: Tensor) -> Tensor:
    """By how much each side of a box x0 y0 x1 y1 (..., 4) is off.

    Where a target is not known as a whole, ``whole`` (...) is False: the known part must lie inside, no more.
    """
    off = boxes - targets
    cuts = torch.cat([off[..., :2], -off[..., 2:]], dim=-1).clamp(min=0)
    return torch.where(whole[..., None], off.abs(), cuts)
