"""One-to-one assignment of queries to targets (DETR, arXiv 2005.12872; costs as in Mask2Former, arXiv 2112.01527)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .config import LossConfig
from .targets import Targets

IMPOSSIBLE = 1e6  # in place of NaN and infinities, which scipy refuses


@dataclass(frozen=True)
class Predictions:
    """What is compared with the targets, in float32, for S = B·D slices. Masks at P points of a slice."""

    class_logits: Tensor
    """(S, N, K + 1)"""
    masks: Tensor
    """Mask logits (S, N, P)."""
    aux_masks: Tensor
    """Auxiliary mask logits (S, N, P)."""
    boxes: Tensor
    """(S, N, 4)"""


@dataclass(frozen=True)
class Matches:
    """M matched pairs; all fields are (M,) int64."""

    slices: Tensor
    queries: Tensor
    targets: Tensor


@torch.no_grad()
def match(
    predictions: Predictions,
    targets: Targets,
    target_points: Tensor,
    valid_points: Tensor,
    depth: int,
    loss: LossConfig,
) -> Matches:
    """The assignment of least cost, for each slice or, with ``loss.matching == "volume"``, for each volume.

    Args:
        predictions: see :class:`Predictions`.
        targets: the targets of the same slices.
        target_points: the targets' masks at the same points, (S, T, P), 0 or 1.
        valid_points: (S, P), 1 where a point is not ignored.
        depth: D, slices of a volume.
        loss: the weights.
    """
    cost = pairwise_cost(predictions, targets, target_points, valid_points, loss)  # (S, N, T)
    device = cost.device
    cost = cost.nan_to_num(IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE)
    classes = targets.classes
    if loss.matching == "volume":
        cost, classes = _per_volume(cost, classes, targets.num_classes, depth)
    # One copy to the host; classes travel with the costs.
    table = torch.cat([cost, classes[:, None].to(cost.dtype)], dim=1).cpu().numpy()
    rows: list[np.ndarray] = []
    for index, block in enumerate(table):
        columns = np.flatnonzero(block[-1] < targets.num_classes)
        query, column = linear_sum_assignment(block[:-1, columns])
        rows.append(np.stack([np.full_like(query, index), query, columns[column]]))
    pairs = torch.from_numpy(np.concatenate(rows, axis=1)).to(device)
    if loss.matching == "volume":
        return _per_slice(pairs, targets, depth)
    return Matches(*pairs)


def pairwise_cost(
    predictions: Predictions, targets: Targets, target_points: Tensor, valid_points: Tensor, loss: LossConfig
) -> Tensor:
    """Cost of every query for every target of its slice, (S, N, T)."""
    with torch.autocast(target_points.device.type, enabled=False):
        probabilities = predictions.class_logits.softmax(-1)  # (S, N, K + 1)
        columns = targets.classes[:, None].expand(-1, probabilities.shape[1], -1)
        cost = -loss.class_weight * probabilities.gather(2, columns)
        pairs = (
            (predictions.masks, loss.mask_bce, loss.mask_dice),
            (predictions.aux_masks, loss.aux_bce, loss.aux_dice),
        )
        for logits, bce, dice in pairs:
            if bce or dice:
                cost = cost + _mask_cost(logits, target_points, valid_points, bce, dice)
        a, b = predictions.boxes[:, :, None], targets.boxes[:, None]  # (S, N, 1, 4), (S, 1, T, 4)
        return cost + loss.box_l1 * (a - b).abs().sum(-1) + loss.box_giou * (1 - generalised_iou(a, b))


def _mask_cost(logits: Tensor, target: Tensor, valid: Tensor, bce: float, dice: float) -> Tensor:
    """BCE and Dice of all pairs by two matrix products: softplus(x) - x t is the cross-entropy of x and t."""
    weight = valid[:, None]  # (S, 1, P)
    count = weight.sum(-1, keepdim=True).clamp(min=1)  # (S, 1, 1)
    target = target.transpose(1, 2)  # (S, P, T)
    all_negative = (F.softplus(logits) * weight).sum(-1, keepdim=True)  # (S, N, 1)
    entropy = (all_negative - (logits * weight) @ target) / count
    scores = logits.sigmoid() * weight
    total = scores.sum(-1, keepdim=True) + target.sum(1, keepdim=True)  # (S, N, T)
    return bce * entropy + dice * (1 - (2 * (scores @ target) + 1) / (total + 1))


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes x0 y0 x1 y1 (..., 4), in [-1, 1]; 0 for two boxes of no area."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    tiny = torch.finfo(a.dtype).tiny
    union = area - inter
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _per_volume(cost: Tensor, classes: Tensor, num_classes: int, depth: int) -> tuple[Tensor, Tensor]:
    """Sum costs over the slices that hold a class: (S, N, T) to (B, N, K)."""
    queries = cost.shape[1]
    columns = classes[:, None].expand(-1, queries, -1)
    by_class = cost.new_zeros(len(cost), queries, num_classes + 1).scatter_add(2, columns, cost)[..., :num_classes]
    held = torch.zeros(len(cost), num_classes + 1, device=cost.device).scatter(1, classes, 1.0)[:, :num_classes] > 0
    held = held.unflatten(0, (-1, depth)).any(1)  # (B, K)
    every = torch.arange(num_classes, device=cost.device)
    return by_class.unflatten(0, (-1, depth)).sum(1), torch.where(held, every, num_classes)


def _per_slice(pairs: Tensor, targets: Targets, depth: int) -> Matches:
    """Hand the volume's assignment of queries to classes down to its slices."""
    num_slices = len(targets.classes)
    query_of = torch.full((num_slices // depth, targets.num_classes + 1), -1, device=pairs.device)
    query_of[pairs[0], pairs[2]] = pairs[1]
    queries = query_of.repeat_interleave(depth, 0).gather(1, targets.classes)  # (S, T)
    slices, columns = (queries >= 0).nonzero(as_tuple=True)
    return Matches(slices, queries[slices, columns], columns)
