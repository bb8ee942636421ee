"""BCE and Dice between masks, at the voxels where they are compared.

Masks are compared piece by piece: nothing of the size of all masks is made but their gradient. Voxels are sampled as in
PointRend (arXiv 1912.08193) and Mask2Former (arXiv 2112.01527).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..modeling.compute import full_precision

CPU_PIECE = 2**19
"""Elements to work on at once: they fit into a cache, and the allocator reuses their memory."""
GPU_PIECE = 2**24
"""Enough to fill a GPU."""


QUOTA = 1 / 8
"""Share of the points that are drawn inside targets: a small one would have none in most steps."""


def draw(
    rows: int, size: int, number: int, valid: Tensor | None, device: torch.device, truth: Tensor | None = None
) -> Tensor:
    """``number`` voxels of ``size`` for each row, with replacement: (rows, number).

    Args:
        rows, size, number: as above.
        valid: (rows, size), true where a voxel may be drawn; None for all.
        device: of the result.
        truth: (rows, T, size) masks; a :data:`QUOTA` of the points, the last ones, is drawn inside them, the same for
            each. The others, or all if there is none, are uniform.
    """
    quota = 0 if truth is None else int(number * QUOTA) // truth.shape[1]
    if truth is not None and quota and rows:
        targets = truth.flatten(0, 1)
        # The places of absent targets go to voxels that may be drawn at all.
        where = targets if valid is None else torch.where(targets.any(1, keepdim=True), targets, _every(valid, truth))
        inside = draw(len(targets), size, quota, where, device).view(rows, -1)
        return torch.cat([draw(rows, size, number - inside.shape[1], valid, device), inside], dim=1)
    if valid is None:
        return torch.randint(size, (rows, number), device=device)
    if not rows or not number:
        return torch.zeros(rows, number, dtype=torch.long, device=device)
    weight = torch.where(valid.any(1, keepdim=True), valid, True).float()  # a row of nothing valid counts nowhere
    return weight.multinomial(number, replacement=True)


def _every(valid: Tensor, truth: Tensor) -> Tensor:
    """What is valid of a row, for each of its targets: (rows, size) to (rows T, size)."""
    return valid[:, None].expand_as(truth).flatten(0, 1)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    pairs: tuple[Tensor, Tensor],
    valid: Tensor | None,
    number: int,
    oversample: float,
    fraction: float,
    truth: Tensor,
) -> Tensor:
    """For each pair, ``number`` voxels, the given fraction of them those of ``oversample`` times as many whose logits
    are nearest to 0: (M, number).

    Args:
        logits: (B, D, N, V).
        pairs: slice and query of each pair, (M,).
        valid: (M, V), False at voxels that must not be drawn; None for all.
        truth: (M, V), the target's mask: a part of the other points lies in it.
    """
    s, q = pairs
    _, depth, _, size = logits.shape
    candidates = draw(len(s), size, int(number * oversample), valid, logits.device)
    at = (s // depth)[:, None], (s % depth)[:, None], q[:, None], candidates
    chosen = int(number * fraction)
    nearest = full_precision(logits[at]).abs().topk(chosen, dim=1, largest=False, sorted=False).indices
    others = draw(len(s), size, number - chosen, valid, logits.device, truth[:, None])
    return torch.cat([candidates.gather(1, nearest), others], dim=1)


def at_points(x: Tensor, points: Tensor | None) -> Tensor:
    """Values of (S, ..., V) at the points (S, P) of each row; all if there are none."""
    if points is None:
        return x
    while points.ndim < x.ndim:
        points = points.unsqueeze(1)
    return x.gather(-1, points.expand(*x.shape[:-1], -1))


class PairSums(NamedTuple):
    """The sums from which BCE and Dice of pairs of masks follow, all of one shape."""

    entropy: Tensor
    """Mean binary cross-entropy."""
    overlap: Tensor
    """Twice the common area, plus one."""
    total: Tensor
    """Both areas, plus one."""

    @property
    def dice_loss(self) -> Tensor:
        return 1 - self.overlap / self.total


@torch.no_grad()
def pairwise_sums(
    masks: Sequence[Tensor], truth: Tensor, valid: Tensor | None, points: Tensor | None, piece: int
) -> list[PairSums]:
    """Every query compared with every target of its slice, (S, N, T) for S = B·D slices; for each of ``masks``.

    Args:
        masks: logits (B, D, N, V).
        truth: the targets' masks, bool (S, T, V); False at ignored voxels.
        valid: bool (S, V), False at ignored voxels; None if there are none.
        points: voxels (S, P) at which to compare; None for all.
        piece: elements to work on at once.
    """
    batch, depth, queries, size = masks[0].shape
    step = max(1, piece // (queries * (size if points is None else points.shape[1])))
    found: list[list[Tensor]] = [[] for _ in masks]
    for volume in range(batch):
        for first in range(0, depth, step):
            last = min(first + step, depth)
            rows = slice(volume * depth + first, volume * depth + last)
            where = None if points is None else points[rows]
            weight = None if valid is None else at_points(valid[rows], where)[:, None]  # (s, 1, P)
            target = at_points(truth[rows], where)  # (s, T, P)
            for logits, parts in zip(masks, found, strict=True):
                x = full_precision(at_points(logits[volume, first:last], where))  # (s, N, P)
                parts.append(_sums(x, target.to(x.dtype), weight))
    return [PairSums(*torch.cat(parts, dim=1)) for parts in found]


def _sums(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The three sums by two matrix products, as softplus(x) - x t is the cross-entropy of x and t: (3, s, N, T)."""
    scores = x.sigmoid()
    negative = _sum_of_softplus(x, scores, weight)[..., None]  # (s, N, 1)
    count: Tensor | int = x.shape[-1]
    if weight is not None:
        x, scores = x * weight, scores * weight
        count = weight.sum(-1, keepdim=True).clamp(min=1)  # (s, 1, 1)
    columns = target.transpose(1, 2)  # (s, P, T)
    entropy = (negative - x @ columns) / count
    total = scores.sum(-1, keepdim=True) + target.sum(-1)[:, None] + 1
    return torch.stack([entropy, 2 * (scores @ columns) + 1, total])


def _sum_of_softplus(x: Tensor, scores: Tensor, weight: Tensor | None) -> Tensor:
    """Over the last axis, given sigmoid(x); ``weight`` is bool.

    softplus(x) = max(x, 0) - log s, where s = sigmoid(|x|) is at least 1/2: so the product of 64 of them is a float32,
    and one logarithm takes the place of 64.
    """
    certain, positive = torch.maximum(scores, 1 - scores), x.clamp(min=0)
    if weight is not None:
        certain, positive = torch.where(weight, certain, 1.0), positive * weight
    whole = x.shape[-1] // 64 * 64
    products = certain[..., :whole].unflatten(-1, (-1, 64)).prod(-1)
    rest = certain[..., whole:].prod(-1)
    return positive.sum(-1) - products.log().sum(-1) - rest.log()


def matched_mask_losses(
    logits: Tensor,
    truth: Tensor,
    valid: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor],
    points: Tensor | None,
    sums: PairSums | None,
    piece: int,
) -> tuple[Tensor, Tensor]:
    """Sums over M pairs of the mean BCE and of the Dice loss.

    Args:
        logits: (B, D, N, V).
        truth, valid: as in :func:`pairwise_sums`.
        pairs: slice, query and target of each pair, (M,) int64; no query of a slice twice.
        points: voxels (M, P) at which to compare; None for all.
        sums: of the pairs at these points, (M,), if they have been computed.
        piece: elements to work on at once.
    """
    bce, dice = _MatchedSums.apply(logits, truth, valid, *pairs, points, sums, piece)
    return bce, dice


class _MatchedSums(torch.autograd.Function):
    """Keeps a few numbers for each pair; the backward pass recomputes the scores and writes gradients in place."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        truth: Tensor,
        valid: Tensor | None,
        s: Tensor,
        q: Tensor,
        t: Tensor,
        points: Tensor | None,
        sums: PairSums | None,
        piece: int,
    ) -> tuple[Tensor, Tensor]:
        number = logits.shape[-1] if points is None else points.shape[1]
        counts = [full_precision(logits.new_zeros(0))]
        parts = [full_precision(logits.new_zeros(3, 0))]
        for _, x, y, weight, _ in _pieces(logits, truth, valid, (s, q, t), points, piece) if sums is None else ():
            scores = x.sigmoid()
            entropy = _sum_of_softplus(x, scores, weight) - (x * y).sum(-1)
            count = x.new_full((len(x),), number)
            if weight is not None:
                scores = scores * weight
                count = weight.sum(-1).clamp(min=1).to(x.dtype)
            overlap = 2 * (scores * y).sum(-1) + 1
            parts.append(torch.stack([entropy / count, overlap, scores.sum(-1) + y.sum(-1) + 1]))
            counts.append(count)
        if sums is None:
            sums, count = PairSums(*torch.cat(parts, dim=1)), torch.cat(counts)
        elif valid is None:
            count = torch.full_like(sums.total, number)
        else:
            count = valid.sum(-1).clamp(min=1)[s].to(sums.total.dtype)
        ctx.save_for_backward(logits, truth, valid, s, q, t, points, sums.overlap, sums.total, count)
        ctx.piece = piece
        return sums.entropy.sum(), sums.dice_loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bce: Tensor, dice: Tensor) -> tuple[Tensor | None, ...]:
        logits, truth, valid, s, q, t, points, overlap, total, count = ctx.saved_tensors
        depth = logits.shape[1]
        gradient = torch.zeros_like(logits)
        of_entropy = (bce / count)[:, None]
        constant = (dice * overlap / total.square())[:, None]
        slope = (2 * dice / total)[:, None]
        for rows, x, y, weight, where in _pieces(logits, truth, valid, (s, q, t), points, ctx.piece):
            scores = x.sigmoid()
            change = (constant[rows] - slope[rows] * y).mul_(scores).mul_(1 - scores)  # of Dice
            change.addcmul_(scores.sub_(y), of_entropy[rows])
            if weight is not None:
                change.mul_(weight)
            if where is not None:  # a voxel may have been drawn twice
                change = change.new_zeros(len(x), logits.shape[-1]).scatter_add_(1, where, change)
            gradient[s[rows] // depth, s[rows] % depth, q[rows]] = change.to(logits.dtype)
        return gradient, None, None, None, None, None, None, None, None


def _pieces(
    logits: Tensor,
    truth: Tensor,
    valid: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor],
    points: Tensor | None,
    piece: int,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Rows of pairs, their logits, truth and valid voxels (m, P), and their points."""
    depth = logits.shape[1]
    step = max(1, piece // max(1, logits.shape[-1]))
    for first in range(0, len(pairs[0]), step):
        rows = slice(first, first + step)
        s, q, t = (index[rows] for index in pairs)
        where = None if points is None else points[rows]
        x = full_precision(at_points(logits[s // depth, s % depth, q], where))
        y = at_points(truth[s, t], where).to(x.dtype)
        yield rows, x, y, None if valid is None else at_points(valid[s], where), where
