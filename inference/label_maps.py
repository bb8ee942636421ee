"""Label maps as nnU-Net reads them, and the classes a dataset.json declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from masksam_nnunet.errors import DataError, MaskSAMError
from masksam_nnunet.plans.images import ImageGeometry, label_values, read_labels


@dataclass(frozen=True)
class Classes:
    """The classes that a dataset.json declares, in the order of nnU-Net's network outputs.

    Attributes:
        foreground: label values of each class or region by name, without background.
        has_regions: whether classes are regions, which may overlap.
        ignore_label: value of voxels that do not count, or None.
    """

    foreground: Mapping[str, tuple[int, ...]]
    has_regions: bool
    ignore_label: int | None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> Classes:
        """Read the labels of a dataset.json by nnU-Net's rules."""
        manager = LabelManager(dict(dataset_json["labels"]), dataset_json.get("regions_class_order"))
        named = {
            name: tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else (value,)))
            for name, value in dataset_json["labels"].items()
            if name != "ignore"
        }
        foreground = {name: values for name, values in named.items() if set(values) != {0}}
        if not manager.has_regions:  # nnU-Net sorts labels by value, and leaves regions as written
            foreground = dict(sorted(foreground.items(), key=lambda item: item[1]))
        return cls(foreground, manager.has_regions, manager.ignore_label)

    @property
    def heads(self) -> list[str]:
        """The name of each channel of the network's output."""
        return list(self.foreground) if self.has_regions else ["background", *self.foreground]

    @property
    def values(self) -> list[int]:
        """All label values that may occur, with background and the ignore label."""
        found = {0, *(value for values in self.foreground.values() for value in values)}
        return sorted(found | ({self.ignore_label} if self.ignore_label is not None else set()))


@dataclass(frozen=True)
class LabelMap:
    """A segmentation with its grid.

    Attributes:
        labels: (D, H, W) whole numbers.
        grid: where its voxels lie.
    """

    labels: NDArray[np.integer[Any]]
    grid: ImageGeometry


def read_label_map(folder: Path, case: str, dataset_json: Mapping[str, Any]) -> LabelMap:
    """Read ``CASE`` + file_ending from a folder.

    Raises:
        DataError: the file is missing, cannot be read, or holds values that dataset.json does not have.
    """
    path = Path(folder) / (case + dataset_json["file_ending"])
    if not path.is_file():
        raise DataError(f"case {case!r} has no label map: {path} does not exist")
    try:
        array, properties = read_labels(path, dataset_json)
    except (MaskSAMError, ValueError) as error:
        raise DataError(f"case {case!r}: {error}") from error
    labels = np.rint(array[0]).astype(np.int32)
    allowed = Classes.from_dataset_json(dataset_json).values
    if unknown := sorted(label_values(labels) - set(allowed)):
        values, known = (", ".join(map(str, listed)) for listed in (unknown[:10], allowed))
        raise DataError(f"case {case!r}: {path} holds the label values {values}, but dataset.json has only {known}")
    return LabelMap(labels, ImageGeometry.of(array, properties))
