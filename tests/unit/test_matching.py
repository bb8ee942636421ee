"""The matcher against brute force, and what must not change it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from configs import loss_config
from torch import Tensor

from masksam_nnunet.config import LossConfig
from masksam_nnunet.losses.masks import PairSums, pairwise_sums
from masksam_nnunet.losses.matching import Matches, box_distance, match, pairwise_cost
from masksam_nnunet.losses.targets import Targets, make_targets
from masksam_nnunet.modeling.geometry import generalised_iou

CLASSES = 3
LOSS = loss_config()


@dataclass
class Predictions:
    class_logits: Tensor
    masks: Tensor
    aux_masks: Tensor
    boxes: Tensor


def problem(queries: int, slices: int = 4, depth: int = 2) -> tuple[Predictions, Targets]:
    labels = torch.randint(0, CLASSES, (slices // depth, 1, depth, 4, 5))
    labels[0, 0, 0] = 0
    targets = make_targets(labels, CLASSES, (4, 5))
    corner = torch.rand(slices, queries, 2)
    boxes = torch.cat([corner, corner + (1 - corner) * torch.rand(slices, queries, 2)], -1)
    logits = torch.randn(slices, queries, CLASSES + 1)
    masks, aux_masks = torch.randn(2, slices // depth, depth, queries, 20)
    return Predictions(logits, masks, aux_masks, boxes), targets


def all_costs(p: Predictions, targets: Targets, loss: LossConfig) -> Tensor:
    valid = None if targets.valid is None else targets.valid.flatten(1)
    sums = pairwise_sums([p.masks, p.aux_masks], targets.masks.flatten(2), valid, None, piece=100)
    return pairwise_cost(p.class_logits, p.boxes, *sums, targets, loss)


def solve(p: Predictions, targets: Targets, matching: str = "slice") -> Matches:
    return match(all_costs(p, targets, LOSS), targets, p.masks.shape[1], matching)


def cost_by_loops(p: Predictions, t: Targets, s: int, n: int, k: int) -> float:
    loss, target = LOSS, t.masks[s, k].flatten().float()
    total = -loss.class_weight * F.softmax(p.class_logits[s, n], -1)[t.classes[s, k]]
    for x, bce, dice in (
        (p.masks.flatten(0, 1), loss.mask_bce, loss.mask_dice),
        (p.aux_masks.flatten(0, 1), loss.aux_bce, loss.aux_dice),
    ):
        score = x[s, n].sigmoid()
        total = total + bce * F.binary_cross_entropy(score, target)
        total = total + dice * (1 - (2 * (score * target).sum() + 1) / (score.sum() + target.sum() + 1))
    total = total + loss.box_l1 * (p.boxes[s, n] - t.boxes[s, k]).abs().sum()
    return float(total + loss.box_giou * (1 - generalised_iou(p.boxes[s, n], t.boxes[s, k])))


@pytest.mark.parametrize("queries", [1, 3, 5])
def test_the_assignment_is_the_best_of_all(queries: int) -> None:
    predictions, targets = problem(queries)
    matches = solve(predictions, targets)
    for s in range(4):
        wanted = targets.present[s].nonzero()[:, 0].tolist()
        size = min(queries, len(wanted))
        best = min(
            sum(cost_by_loops(predictions, targets, s, n, k) for n, k in zip(ns, ks, strict=True))
            for ns in itertools.permutations(range(queries), size)
            for ks in itertools.combinations(wanted, size)
        )
        here = matches.slices == s
        pairs = list(zip(matches.queries[here].tolist(), matches.targets[here].tolist(), strict=True))
        assert len(pairs) == size and len({n for n, _ in pairs}) == size
        assert sum(cost_by_loops(predictions, targets, s, n, k) for n, k in pairs) == pytest.approx(best, abs=1e-4)


def test_in_a_volume_a_query_keeps_its_class_and_the_sum_is_least() -> None:
    predictions, targets = problem(queries=4, slices=6, depth=3)
    matches = solve(predictions, targets, "volume")
    assert len(matches.slices) == int(targets.present.sum())
    for volume in range(2):
        slices = range(3 * volume, 3 * volume + 3)
        inside = (matches.slices // 3) == volume
        query_of: dict[int, set[int]] = {}
        for s, n, k in zip(
            *(getattr(matches, f)[inside].tolist() for f in ("slices", "queries", "targets")), strict=True
        ):
            query_of.setdefault(int(targets.classes[s, k]), set()).add(n)
        assert all(len(ns) == 1 for ns in query_of.values())

        def total(assignment: dict[int, int], slices: range = slices) -> float:
            return sum(
                cost_by_loops(predictions, targets, s, assignment[int(c)], k)
                for s in slices
                for k, c in enumerate(targets.classes[s])
                if c < CLASSES
            )

        classes = sorted(query_of)
        best = min(total(dict(zip(classes, ns, strict=True))) for ns in itertools.permutations(range(4), len(classes)))
        assert total({c: next(iter(ns)) for c, ns in query_of.items()}) == pytest.approx(best, abs=1e-4)


def test_no_target_no_match_and_nan_still_matches() -> None:
    predictions, targets = problem(queries=3)
    predictions.masks[0, 0, 1] = torch.nan
    assert len(solve(predictions, targets).slices) > 0
    targets = make_targets(torch.full((2, 1, 2, 4, 5), 9), CLASSES, (4, 5), ignore_label=9)
    for matching in ("slice", "volume", "class"):
        assert len(solve(predictions, targets, matching).slices) == 0


@pytest.mark.parametrize("each", [1, 2])
def test_queries_of_classes_are_matched_within_their_class(each: int) -> None:
    predictions, _ = problem(queries=each * CLASSES)
    labels = torch.tensor([[1, 1, 0, 2, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 1, 1, 0]])  # of the first slice
    labels = torch.stack([labels, torch.zeros(4, 5, dtype=torch.long)]).repeat(2, 1, 1).view(2, 1, 2, 4, 5)
    targets = make_targets(labels, CLASSES, (4, 5), parts=each)
    matches = solve(predictions, targets, "class")
    assert torch.equal(matches.queries // each, targets.classes[matches.slices, matches.targets])
    found = set(zip(matches.slices.tolist(), matches.targets.tolist(), strict=True))
    assert found == set(map(tuple, targets.present.nonzero().tolist())) and len(found) == len(matches.slices)
    if each == 1:
        torch.testing.assert_close(vars(Matches.of_classes(targets)), vars(matches))
    else:  # two parts of class 1, in the better order
        orders = [(2, 1), (3, 2)], [(3, 1), (2, 2)]
        best = min(orders, key=lambda pairs: sum(cost_by_loops(predictions, targets, 0, n, k) for n, k in pairs))
        first = matches.slices == 0
        assert set(best) <= set(zip(matches.queries[first].tolist(), matches.targets[first].tolist(), strict=True))


def test_a_box_that_may_reach_ignored_voxels_is_compared_one_sided() -> None:
    """The extent of the labelled part must lie inside: a larger box costs nothing, a cut costs what it cuts."""
    labels = torch.zeros(1, 1, 2, 4, 10, dtype=torch.long)
    labels[..., 1:3, 4:6] = 1
    labels[0, 0, 0, 0, 0] = 9  # in the first slice only
    targets = make_targets(labels, 2, (4, 10), ignore_label=9)
    assert targets.whole.tolist() == [False, True]
    larger, cutting = torch.tensor([[0.3, 0.0, 0.9, 1.0], [0.5, 0.25, 0.5, 0.75]])
    given = targets.boxes[:, 1]
    for box, one_sided, two_sided in (
        (larger, [0, 0, 0, 0], [0.1, 0.25, 0.3, 0.25]),
        (cutting, [0.1, 0, 0.1, 0], None),
    ):
        distance = box_distance(box, given, targets.whole)
        torch.testing.assert_close(distance, torch.tensor([one_sided, two_sided or one_sided]).float())
    boxes = torch.stack([larger, cutting]).repeat(2, 1, 1)  # (S, N, 4)
    equal = PairSums(*torch.ones(3, 2, 2, 2))
    loss = LossConfig(**dict.fromkeys(("class_weight", "mask_dice", "mask_bce", "aux_dice", "aux_bce"), 0.0))
    cost = pairwise_cost(torch.zeros(2, 2, 3), boxes, equal, equal, targets, loss)[..., 1]  # of class 1
    giou = 1 - generalised_iou(boxes[1], given[1])
    torch.testing.assert_close(cost[0], torch.tensor([0.0, 0.5 * 0.2]))
    torch.testing.assert_close(cost[1], 0.5 * torch.tensor([0.9, 0.2]) + 0.2 * giou)


def test_generalised_iou_by_hand() -> None:
    a = torch.tensor([0.0, 0.0, 0.5, 0.5])
    assert generalised_iou(a, a) == 1
    b = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert generalised_iou(a, b) == pytest.approx(-0.5)  # union is half of the hull
    c = torch.tensor([0.25, 0.0, 0.75, 0.5])
    assert generalised_iou(a, c) == pytest.approx(1 / 3)
    point = torch.zeros(4)
    assert torch.isfinite(generalised_iou(point, point))
