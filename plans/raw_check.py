"""Reads every file of a raw dataset for ``masksam check`` and lists all defects.

nnU-Net's ``--verify_dataset_integrity`` stops at the first kind of defect, misses NaN in a NIfTI file and truncated
files, since ITK reads over both, and only warns where image and label lie at different places.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksam_nnunet.errors import DataError

from .images import ImageGeometry, count_non_finite, in_threads, label_values, read_image, read_labels
from .raw_data import RawDataset, inspect_raw_dataset, shortened
from .splits import SPLITS_FILE, overlaps, read_splits


@dataclass(frozen=True)
class RawCheck:
    """The dataset as far as it can be listed, defects that must be corrected, and notes on what may be intended."""

    dataset: RawDataset
    defects: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _CaseCheck:
    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    geometries: dict[str, ImageGeometry] = field(default_factory=dict)
    image_hash: bytes | None = None


def check_raw_dataset(folder: Path, preprocessed: Path | None = None) -> RawCheck:
    """Read a raw dataset to its last voxel, and splits_final.json there and in its ``preprocessed`` folder.

    Raises:
        DataError: it cannot be listed at all.
    """
    dataset, defects = inspect_raw_dataset(folder)
    notes: list[str] = []
    for file in (part / SPLITS_FILE for part in (dataset.folder, preprocessed) if part is not None):
        try:
            if file.is_file():
                defects += [f"{file}: {text}" for text in overlaps(read_splits(file, dataset.images))]
        except DataError as error:
            defects.append(str(error))
    cases = in_threads(partial(_check_case, dataset), list(dataset.images), "checking")
    same: dict[bytes, list[str]] = {}
    for name, result in zip(dataset.images, cases, strict=True):
        defects += result.defects
        notes += result.notes
        if result.image_hash is not None:
            same.setdefault(result.image_hash, []).append(name)
    notes += [
        f"cases {', '.join(names)} have the same image; a fold may train on one and validate the other"
        for names in same.values()
        if len(names) > 1
    ]
    return RawCheck(dataset, tuple(defects), tuple(notes))


def require_sound_dataset(folder: Path) -> None:
    """Raise a DataError with the first defects of a raw dataset, before work that would take longer."""
    defects = list(check_raw_dataset(folder).defects)
    if defects:
        raise DataError(f"{folder} cannot be used:\n  " + shortened(defects, "\n  "))


def _read_known_labels(dataset: RawDataset, case: str) -> tuple[NDArray[np.int32], ImageGeometry]:
    """A case's label map (D, H, W), whose values dataset.json names."""
    path = dataset.labels[case]
    array, properties = read_labels(path, dataset.dataset_json)
    labels = np.rint(array[0]).astype(np.int32)
    manager = dataset.label_manager
    unknown = sorted(label_values(labels) - {*map(int, manager.all_labels), manager.ignore_label})
    if unknown:
        raise DataError(f"{path} holds the labels {', '.join(map(str, unknown[:10]))}, which dataset.json lacks")
    return labels, ImageGeometry.of(array, properties)


def _check_case(dataset: RawDataset, case: str) -> _CaseCheck:
    check = _CaseCheck()
    digest, channels = hashlib.sha256(), 0
    array: NDArray[Any]
    files = [*dataset.images[case], dataset.labels[case]]
    for path in filter(Path.is_file, files):
        try:
            if path == files[-1]:
                array, geometry = _read_known_labels(dataset, case)
                one_value = "background only" if not array.any() else ""
            else:
                array, geometry = _read_finite_image(dataset, path)
                one_value = f"one value only, {array.flat[0]:g}" if array.min() == array.max() else ""
                channels += len(array)
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array).data)
        except (DataError, MemoryError) as error:
            check.defects.append(f"case {case!r}: {str(error) or f'{path} does not fit into memory'}")
            continue
        check.geometries[f"{path.parent.name}/{path.name}"] = geometry
        if one_value:
            check.notes.append(f"case {case!r}: {path} holds {one_value}")
    if len(check.geometries) < len(files):
        return check
    check.image_hash = digest.digest()
    wanted = len(dataset.dataset_json["channel_names"])
    if channels != wanted:
        check.defects.append(f"case {case!r} has {channels} channels, channel_names in dataset.json has {wanted}")
    (first, geometry), *others = check.geometries.items()
    for name, other in others:
        difference = geometry.difference(other)
        if difference is not None:
            what, one, two = difference
            check.defects.append(
                f"case {case!r}: {first} and {name} differ in {what} ({one} and {two}); resample one, or correct its "
                "header"
            )
    return check


def _read_finite_image(dataset: RawDataset, path: Path) -> tuple[NDArray[np.floating[Any]], ImageGeometry]:
    """One image file (C, D, H, W)."""
    array, properties = read_image(path, dataset.dataset_json)
    if odd := count_non_finite(path, array):
        raise DataError(f"{path} holds {odd} voxels that are NaN or infinite; replace them")
    return array, ImageGeometry.of(array, properties)
