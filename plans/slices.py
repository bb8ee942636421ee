"""How many targets one slice of the training labels holds: what N, the number of queries, must cover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from masksam_nnunet.errors import DataError

from .image_reading import ImageFileError, NotLabelsError, read_labels
from .threads import in_threads


@dataclass(frozen=True)
class SliceCount:
    """Attributes: the most targets in one slice, the case and the slice that hold them, the number of cases read."""

    most: int
    case: str
    slice: int
    cases: int


def count_targets(labels: Mapping[str, Path], dataset_json: Mapping[str, Any], slice_axis: int) -> SliceCount:
    """Read all training labels and find the slice with the most targets.

    A slice's targets are the labels in it, background included and the ignore label not; or the regions that it holds.

    Args:
        labels: file of each case's label map.
        dataset_json: of the dataset.
        slice_axis: the axis of the reader's (z, y, x) arrays that becomes D: the first of ``transpose_forward``.

    Raises:
        DataError: if a label map cannot be read or holds a label that dataset.json does not name.
    """
    manager = LabelManager(dict(dataset_json["labels"]), dataset_json.get("regions_class_order"))
    groups = _groups(manager)
    named = {int(label) for label in manager.all_labels}
    if manager.ignore_label is not None:
        named.add(int(manager.ignore_label))

    def count(entry: tuple[str, Path]) -> tuple[int, str, int]:
        case, path = entry
        try:
            volume, _ = read_labels(path, dataset_json)
        except NotLabelsError as error:
            raise DataError(f"case {case!r}: {error}; write whole numbers into it") from error
        except ImageFileError as error:
            raise DataError(f"case {case!r}: {error}") from error
        per_slice = _targets_of_slices(case, path, np.moveaxis(volume[0], slice_axis, 0), groups, named)
        return int(per_slice.max()), case, int(per_slice.argmax())

    counts = in_threads(count, list(labels.items()))
    most, case, index = max(counts, key=lambda found: found[0])
    return SliceCount(most, case, index, len(counts))


def _groups(manager: LabelManager) -> list[tuple[int, ...]]:
    """The label values of each possible target."""
    if manager.has_regions:
        return [
            tuple(region) if isinstance(region, list | tuple) else (region,) for region in manager.foreground_regions
        ]
    return [(int(label),) for label in manager.all_labels]


def _targets_of_slices(
    case: str, path: Path, volume: NDArray[Any], groups: list[tuple[int, ...]], named: set[int]
) -> NDArray[np.intp]:
    """Number of targets in each slice of a label map (D, H, W); one slice is converted at a time."""
    highest = max(named)
    present = np.zeros((len(volume), highest + 1), dtype=bool)
    for index, plane in enumerate(volume):
        values = np.rint(plane).astype(np.int64).ravel()
        if len(values) and (values.min() < 0 or values.max() > highest):
            raise DataError(_unknown(case, path, int(values.min() if values.min() < 0 else values.max())))
        present[index] = np.bincount(values, minlength=highest + 1) > 0
    for value in np.flatnonzero(present.any(0)).tolist():
        if value not in named:
            raise DataError(_unknown(case, path, value))
    return np.stack([present[:, list(group)].any(1) for group in groups]).sum(0)


def _unknown(case: str, path: Path, value: int) -> str:
    return (
        f"case {case!r}: {path} holds the label {value}, which dataset.json does not name; "
        "add it there or correct the label map"
    )
