"""Targets of mask classification: for each slice, one for each class that is present."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..modeling.geometry import mask_extent, scaled_boxes

TOUCHING = np.ones((3, 3))  # pixels of one connected part: thin structures run along diagonals too


@dataclass(frozen=True)
class Targets:
    """Targets of S = B·D slices, padded to T, at least the largest number in one slice."""

    classes: Tensor
    """(S, T) int64; K in places that hold no target."""
    masks: Tensor
    """(S, T, H, W) bool; nowhere true at ignored voxels."""
    boxes: Tensor
    """(S, T, 4) float32: x0 y0 x1 y1 as shares of the padded patch."""
    valid: Tensor | None
    """(S, H, W) bool: voxels that are not ignored; None if the dataset ignores none."""
    num_classes: int
    """K"""

    @property
    def whole(self) -> Tensor:
        """(S,) bool: slices without ignored voxels, into which a target might extend."""
        if self.valid is None:
            return torch.ones(len(self.classes), dtype=torch.bool, device=self.classes.device)
        return self.valid.flatten(1).all(1)

    @property
    def present(self) -> Tensor:
        """(S, T) bool: where a target is."""
        return self.classes < self.num_classes


def make_targets(
    segmentation: Tensor,
    num_classes: int,
    padded: tuple[int, int],
    regions: bool = False,
    ignore_label: int | None = None,
    most: int | None = None,
    parts: int = 1,
) -> Targets:
    """Build the targets of a batch for all slices at once.

    Args:
        segmentation: (B, 1, D, H, W) labels; or, with regions, (B, K, D, H, W) of 0 and 1, and one more channel that
            marks ignored voxels if there is an ignore label. A 2D patch has no D.
        num_classes: K.
        padded: in-plane size to which boxes relate, :attr:`Grid.padded`.
        regions: whether the classes are regions; each is then a target of its own.
        ignore_label: the label that is ignored, if there is one.
        most: T, if it is known that no slice holds more; else it is looked up, which an accelerator waits for.
        parts: targets of a class in a slice, at most: its largest connected parts, corners count, the last one with all
            that is left; background is one, and so is a class in a slice with ignored voxels.

    Raises:
        ValueError: for another number of channels. Labels outside 0..K-1 are nnU-Net's to find, before training.
    """
    if segmentation.ndim == 4:
        segmentation = segmentation[:, :, None]
    channels = num_classes + (ignore_label is not None) if regions else 1
    if segmentation.ndim != 5 or segmentation.shape[1] != channels:
        raise ValueError(
            f"segmentation of shape {tuple(segmentation.shape)}: expected (B, {channels}, D, H, W) "
            f"for {num_classes} {'regions' if regions else 'classes'} and ignore label {ignore_label}"
        )
    slices = segmentation.transpose(1, 2).flatten(0, 1)  # (S, channels, H, W)
    valid = None
    if regions:
        maps = slices[:, :num_classes] > 0  # (S, K, H, W)
        if ignore_label is not None:
            valid = slices[:, -1] == 0
            maps &= valid[:, None]
        classes = _padded_classes(maps.view(torch.uint8).flatten(2).amax(-1) > 0, most)
        index = classes.clamp(max=num_classes - 1)[:, :, None, None].expand(-1, -1, *maps.shape[2:])
        masks = maps.gather(1, index) & (classes < num_classes)[:, :, None, None]
    else:
        labels = slices[:, 0].long()  # (S, H, W)
        if ignore_label is not None:
            valid = labels != ignore_label
            labels = torch.where(valid, labels, num_classes)
        found = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
        classes = _padded_classes(found.scatter_(1, labels.flatten(1), True)[:, :num_classes], most)
        wanted = torch.where(classes < num_classes, classes, -1)  # ignored voxels are K here
        masks = labels[:, None] == wanted[:, :, None, None]
    targets = Targets(classes, masks, _boxes(masks, padded), valid, num_classes)
    if parts > 1:
        classes, masks = _split(targets, parts, first=0 if regions else 1)
        targets = replace(targets, classes=classes, masks=masks, boxes=_boxes(masks, padded))
    return targets


def _split(targets: Targets, parts: int, first: int) -> tuple[Tensor, Tensor]:
    """Connected parts of the masks of classes from ``first``, as targets of their own; found on the host.

    Slices with ignored voxels keep theirs: a part may go on there, and parts that look apart be one.
    """
    classes, masks, num_classes = targets.classes, targets.masks, targets.num_classes
    found: list[list[tuple[int, np.ndarray]]] = []
    for row, of_slice, apart in zip(classes.tolist(), masks.cpu().numpy(), targets.whole.tolist(), strict=True):
        found.append([])
        for number, mask in zip(row, of_slice, strict=True):
            if number == num_classes:
                continue
            split = apart and number >= first
            labels, count = ndimage.label(mask, TOUCHING) if split else (mask.astype(np.int32), 1)
            rank = np.argsort(-np.bincount(labels.ravel(), minlength=count + 1)[1:], kind="stable") + 1
            kept = [labels == label for label in rank[: parts - 1 if count > parts else parts]]
            rest = [np.isin(labels, rank[parts - 1 :])] if count > parts else []
            found[-1] += [(number, part) for part in kept + rest]
    most = max(1, *map(len, found))
    new_classes = np.full((len(classes), most), num_classes)
    new_masks = np.zeros((len(masks), most, *masks.shape[2:]), dtype=bool)
    for index, of_one in enumerate(found):
        for column, (number, part) in enumerate(of_one):
            new_classes[index, column] = number
            new_masks[index, column] = part
    return torch.from_numpy(new_classes).to(classes), torch.from_numpy(new_masks).to(masks)


def _padded_classes(present: Tensor, most: int | None) -> Tensor:
    """(S, K) bool to (S, T): the indices that are true, ascending, then K."""
    num_classes = present.shape[1]
    index = torch.where(present, torch.arange(num_classes, device=present.device), num_classes)
    if most is None:
        most = max(1, int(present.sum(1).max()))
    return index.sort(dim=1).values[:, :most]


def _boxes(masks: Tensor, padded: tuple[int, int]) -> Tensor:
    """Shares of the padded patch: the padding lies at the lower right, so only the scale changes."""
    height, width = masks.shape[-2:]
    return scaled_boxes(mask_extent(masks)[0], width / padded[1], height / padded[0])
