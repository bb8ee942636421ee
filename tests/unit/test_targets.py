"""Targets against a plain loop over slices and labels."""

from __future__ import annotations

import pytest
import torch

from masksam_nnunet.losses.targets import make_targets


def by_loops(labels: torch.Tensor, num_classes: int, ignore: int | None) -> list[dict[int, torch.Tensor]]:
    slices = labels[:, 0].flatten(0, 1)
    return [{c: s == c for c in range(num_classes) if (s == c).any() and c != ignore} for s in slices]


@pytest.mark.parametrize("ignore", [None, 4])
def test_labels(ignore: int | None) -> None:
    labels = torch.randint(0, 5 if ignore else 4, (2, 1, 3, 6, 9))
    labels[0, 0, 1] = 0  # background only
    labels[1, 0, 2] = 4 if ignore else 3  # ignored throughout, or one class
    targets = make_targets(labels, 4, (8, 12), ignore_label=ignore)
    expected = by_loops(labels, 4, ignore)
    assert len(targets.classes) == 6
    for index, wanted in enumerate(expected):
        present = targets.present[index]
        assert targets.classes[index][present].tolist() == sorted(wanted)
        for c, mask, box in zip(targets.classes[index], targets.masks[index], targets.boxes[index], strict=True):
            if c == 4:
                assert not mask.any()
                continue
            assert torch.equal(mask, wanted[int(c)])
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            box_by_hand = [columns.min() / 12, rows.min() / 8, (columns.max() + 1) / 12, (rows.max() + 1) / 8]
            torch.testing.assert_close(box, torch.tensor(box_by_hand))
    if ignore is None:
        assert targets.valid is None
    else:
        assert targets.valid is not None and torch.equal(targets.valid, (labels != 4)[:, 0].flatten(0, 1))
    roomy = make_targets(labels, 4, (8, 12), ignore_label=ignore, most=4)  # as on an accelerator
    found = targets.classes.shape[1]
    assert torch.equal(roomy.masks[:, :found], targets.masks) and not roomy.masks[:, found:].any()
    assert torch.equal(roomy.classes[:, :found], targets.classes) and (roomy.classes[:, found:] == 4).all()
    assert torch.equal(roomy.boxes[:, :found], targets.boxes)


def test_regions_are_targets_of_their_own_and_may_overlap() -> None:
    whole = torch.zeros(1, 3, 2, 4, 4, dtype=torch.bool)
    whole[0, 0, 0, :3, :3] = True  # region 0
    whole[0, 1, 0, 1:3, 1:3] = True  # region 1, inside it
    whole[0, 2, 0, 0, 0] = True  # ignored
    targets = make_targets(whole, 2, (4, 4), regions=True, ignore_label=9)
    assert targets.classes.tolist() == [[0, 1], [2, 2]]
    assert targets.masks[0].sum((1, 2)).tolist() == [8, 4]  # the ignored voxel counts nowhere
    assert not targets.masks[1].any()
    assert not targets.valid[0, 0, 0] and targets.valid.sum() == 31


@pytest.mark.parametrize("regions", [False, True])
def test_connected_parts_are_targets_of_their_own(regions: bool) -> None:
    """A class of three parts, and one that is whole, in the first slice; background, in two parts, stays one."""
    labels = torch.zeros(1, 1, 2, 6, 12, dtype=torch.long)
    labels[0, 0, 0, :, 3] = 1  # 6 voxels, all the height
    labels[0, 0, 0, [1, 1, 2, 1], range(5, 9)] = 1  # 4, of which one touches at corners
    labels[0, 0, 0, 4, 6] = 1  # 1
    labels[0, 0, 0, 3:5, 9:11] = 2
    if regions:
        labels = torch.cat([labels == c for c in range(3)], dim=1)
    for parts, sizes in ((2, [6, 5]), (3, [6, 4, 1]), (5, [6, 4, 1])):
        targets = make_targets(labels, 3, (6, 12), regions, parts=parts)
        background = [57] if not regions else [39, 18][:parts]
        assert targets.classes[0].tolist() == [0] * len(background) + [1] * len(sizes) + [2]
        assert targets.masks[0].sum((1, 2)).tolist() == [*background, *sizes, 4]
        assert targets.present[1].tolist() == [True] + [False] * (targets.classes.shape[1] - 1)
    rest = make_targets(labels, 3, (6, 12), regions, parts=2).boxes[0, len(background) + 1]
    torch.testing.assert_close(rest, torch.tensor([5 / 12, 1 / 6, 9 / 12, 5 / 6]))
    if regions:
        labels = torch.cat([labels, torch.zeros_like(labels[:, :1])], dim=1)
    labels[0, -1, 0, 0, 0] = 1 if regions else 9  # ignored
    assert make_targets(labels, 3, (6, 12), regions, 9, parts=2).classes[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("shape", "regions"), [((1, 2, 3, 4, 4), False), ((1, 1, 3, 4, 4), True), ((1, 4, 4), False)])
def test_a_wrong_segmentation_is_named(shape: tuple[int, ...], regions: bool) -> None:
    with pytest.raises(ValueError, match="segmentation of shape"):
        make_targets(torch.zeros(shape), 2, (4, 4), regions=regions)
