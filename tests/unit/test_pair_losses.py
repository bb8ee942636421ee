"""Mask comparisons in pieces against the same sums written out, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masksam_nnunet.losses.masks import QUOTA, at_points, draw, matched_mask_losses, pairwise_sums, uncertain_points

B, D, N, T, V = 2, 3, 4, 3, 150
PAIRS = torch.tensor([0, 0, 1, 3, 5, 5]), torch.tensor([2, 0, 3, 1, 0, 2]), torch.tensor([0, 2, 1, 1, 2, 0])


def problem(ignore: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    # As the network returns them: the axes of slices and queries are swapped in memory.
    logits = (4 * torch.randn(B, N, D, V, dtype=torch.float64)).transpose(1, 2).requires_grad_()
    truth = torch.rand(B * D, T, V) > 0.6
    if not ignore:
        return logits, truth, None
    known = torch.rand(B * D, V) > 0.3
    known[3] = False
    return logits, truth & known[:, None], known


def written_out(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean BCE and Dice loss of rows (M, P) of logits, truth and known voxels."""
    y, w = y.to(x.dtype), w.to(x.dtype)
    bce = (F.binary_cross_entropy_with_logits(x, y, reduction="none") * w).sum(-1) / w.sum(-1).clamp(min=1)
    p = x.sigmoid() * w
    return bce, 1 - (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_all_pairs(ignore: bool, sampled: bool, piece: int) -> None:
    logits, truth, known = problem(ignore)
    points = torch.randint(V, (B * D, 70)) if sampled else None
    sums, doubled = pairwise_sums([logits, 2 * logits], truth, known, points, piece)
    x = at_points(logits.flatten(0, 1), points)
    y = at_points(truth, points)
    w = torch.ones_like(y[:, 0]) if known is None else at_points(known, points)
    for n in range(N):
        for t in range(T):
            for received, factor in ((sums, 1), (doubled, 2)):
                bce, dice = written_out(factor * x[:, n], y[:, t], w)
                torch.testing.assert_close(received.entropy[:, n, t], bce)
                torch.testing.assert_close(received.dice_loss[:, n, t], dice)


@pytest.mark.parametrize("piece", [1, 320])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_matched_pairs_and_their_gradient(ignore: bool, sampled: bool, piece: int) -> None:
    logits, truth, known = problem(ignore)
    s, q, t = PAIRS
    points = torch.randint(V, (len(s), 70)) if sampled else None  # some twice
    x = at_points(logits[s // D, s % D, q], points)
    w = torch.ones(len(s), V, dtype=torch.bool) if known is None else known[s]
    bce, dice = (each.sum() for each in written_out(x, at_points(truth[s, t], points), at_points(w, points)))
    (expected,) = torch.autograd.grad(2 * bce + 3 * dice, logits)

    given = [None]
    if points is None:
        all_pairs = pairwise_sums([logits], truth, known, None, piece)[0]
        given.append(type(all_pairs)(*(each[s, q, t] for each in all_pairs)))
    for sums in given:
        received = matched_mask_losses(logits, truth, known, PAIRS, points, sums, piece)
        torch.testing.assert_close(received, (bce, dice))
        (gradient,) = torch.autograd.grad(2 * received[0] + 3 * received[1], logits)
        torch.testing.assert_close(gradient, expected)


def test_certain_logits_in_low_precision() -> None:
    logits = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0]).repeat(40).to(torch.bfloat16)[None, None, None]
    truth = torch.zeros(1, 1, 200, dtype=torch.bool)
    sums = pairwise_sums([logits], truth, None, None, 10**6)[0]
    assert sums.entropy.dtype == torch.float32
    assert float(sums.entropy) == pytest.approx((230 + 0.6931472) / 5, rel=1e-6)


def test_uncertain_points_are_preferred() -> None:
    logits = torch.randn(2, 2, 5, 384)
    pairs = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 4])
    truth = torch.zeros(3, 384, dtype=torch.bool)
    points = uncertain_points(logits, pairs, None, 64, oversample=2.0, fraction=0.75, truth=truth)
    assert points.shape == (3, 64)
    values = logits.flatten(0, 1)[pairs].gather(1, points).abs()
    assert values[:, :48].mean() < 0.75 * values[:, 48:].mean()


@pytest.mark.parametrize("ignore", [False, True])
def test_a_quota_of_points_lies_in_targets_and_none_at_ignored_voxels(ignore: bool) -> None:
    size, number = 2000, 320
    truth = torch.zeros(3, 2, size, dtype=torch.bool)
    truth[0, 0, 7:12] = truth[0, 1, 1500:] = truth[1, 0, 3] = True  # two targets, one, none
    known = torch.rand(3, size) < 0.5 if ignore else torch.ones(3, size, dtype=torch.bool)
    known |= truth.any(1)
    given = known if ignore else None
    points = draw(3, size, number, given, truth.device, truth)
    each = int(number * QUOTA) // 2
    assert points.shape == (3, number) and known.gather(1, points).all()
    for row, target, first in ((0, 0, number - 2 * each), (0, 1, number - each), (1, 0, number - 2 * each)):
        assert truth[row, target][points[row, first : first + each]].all()
    assert not truth[0].any(0)[points[0, : number - 2 * each]].all()
    pairs = torch.arange(3), torch.zeros(3, dtype=torch.long)
    points = uncertain_points(torch.randn(1, 3, 1, size), pairs, given, number, 2.0, 0.75, truth[:, 0])
    assert points.shape == (3, number) and known.gather(1, points).all()
    assert truth[:2, 0].gather(1, points[:2, -number // 4 :]).sum(1).ge(number // 4 * QUOTA).all()
