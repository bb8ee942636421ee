"""``masksam check``: list all defects of a raw dataset, by reading every file of it.

nnU-Net's ``--verify_dataset_integrity`` stops at the first kind of defect, sees neither NaN in a NIfTI file nor that a
file is cut off, since ITK reads over both, and only warns where image and label lie at different places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from masksam_nnunet.errors import DataError

from .image_reading import Grid, ImageFileError, NotLabelsError, read_image, read_labels
from .nifti_files import stored_floats
from .raw_data import RawDataset, inspect_raw_dataset
from .splits import overlaps, read_splits
from .threads import in_threads

_SPLITS = "splits_final.json"
_SHOWN = 5


@dataclass(frozen=True)
class Findings:
    """What is wrong, and what may be intended; each a sentence that names the file."""

    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RawCheck:
    """What was found.

    Attributes:
        dataset: as far as it can be listed.
        defects: what must be corrected.
        notes: what may be intended.
    """

    dataset: RawDataset
    defects: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Case:
    """What was found in a case, and a hash of its image; None where that cannot be read."""

    findings: Findings
    image: bytes | None


def check_raw_dataset(folder: Path, preprocessed: Path | None = None) -> RawCheck:
    """Read a raw dataset to its last voxel.

    Args:
        folder: ``DatasetXXX_Name``.
        preprocessed: its preprocessed folder, whose splits_final.json is looked at too.

    Raises:
        DataError: it cannot be listed at all.
    """
    dataset, defects = inspect_raw_dataset(folder)
    found = Findings(defects)
    for file in (part / _SPLITS for part in (dataset.folder, preprocessed) if part is not None):
        if file.is_file():
            found.defects.extend(_split_defects(file, dataset))
    cases = dict(
        zip(dataset.images, in_threads(partial(_examine, dataset), list(dataset.images), "checking"), strict=True)
    )
    for result in cases.values():
        found.defects.extend(result.findings.defects)
        found.notes.extend(result.findings.notes)
    found.notes.extend(_twins(cases))
    return RawCheck(dataset, tuple(found.defects), tuple(found.notes))


def _split_defects(file: Path, dataset: RawDataset) -> list[str]:
    try:
        splits = read_splits(file, dataset.images)
    except DataError as error:
        return [str(error)]
    return [f"{file}: {text}; write it again with masksam split" for text in overlaps(splits)]


def _twins(cases: Mapping[str, _Case]) -> Iterator[str]:
    """Cases with the same image: a split may train on one and validate the other."""
    same: dict[bytes, list[str]] = {}
    for case, result in cases.items():
        if result.image is not None:
            same.setdefault(result.image, []).append(case)
    for names in same.values():
        if len(names) > 1:
            yield f"cases {', '.join(names)} have the same image; a fold may train on one and validate the other"


def require_sound_dataset(folder: Path) -> None:
    """Read a whole raw dataset before work that would take longer.

    Raises:
        DataError: the first things that are wrong with it.
    """
    result = check_raw_dataset(folder)
    if result.defects:
        more = f"\n  ... and {len(result.defects) - _SHOWN} more" if len(result.defects) > _SHOWN else ""
        shown = "".join(f"\n  {defect}" for defect in result.defects[:_SHOWN])
        raise DataError(f"{folder} cannot be used:{shown}{more}")


def require_sound_case(dataset: RawDataset, case: str) -> None:
    """Read one case, for commands that have no time to read all.

    Raises:
        DataError: what is wrong with it.
    """
    defects = _examine(dataset, case).findings.defects
    if defects:
        raise DataError(
            f"{'; '.join(defects)}; see what else is wrong with the dataset: masksam check -d {dataset.number}"
        )


def _examine(dataset: RawDataset, case: str) -> _Case:
    found = Findings()
    images = [_image(path, case, dataset, found) for path in dataset.images[case] if path.is_file()]
    label = _label(dataset.labels[case], case, dataset, found) if dataset.labels[case].is_file() else None
    read = [(path, *image) for path, image in zip(dataset.images[case], images, strict=False) if image is not None]
    if len(read) < len(dataset.images[case]):
        return _Case(found, None)
    channels, wanted = sum(len(array) for _, array, _ in read), len(dataset.dataset_json["channel_names"])
    if channels != wanted:
        found.defects.append(
            f"case {case!r} has {channels} channels, channel_names in dataset.json has {wanted}; make them agree"
        )
    first, _, grid = read[0]
    others = [(path.name, other) for path, _, other in read[1:]]
    if label is not None:
        others.append((f"its label map {dataset.labels[case].name}", label))
    for name, other in others:
        difference = grid.difference(other)
        if difference is not None:
            what, one, two = difference
            found.defects.append(
                f"case {case!r}: {first.name} and {name} differ in {what} ({one} and {two}); resample one onto the "
                "other's grid, or correct its header"
            )
    digest = hashlib.sha256()
    for _, array, _ in read:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return _Case(found, digest.digest())


def _image(path: Path, case: str, dataset: RawDataset, found: Findings) -> tuple[NDArray[Any], Grid] | None:
    try:
        array, properties = read_image(path, dataset.dataset_json)
        stored = stored_floats(path)
    except (ImageFileError, MemoryError) as error:
        found.defects.append(f"case {case!r}: {str(error) or f'{path} does not fit into memory'}")
        return None
    odd = max(int(np.count_nonzero(~np.isfinite(values))) for values in (array, stored))
    if odd:
        found.defects.append(
            f"case {case!r}: {path} holds {odd} voxels that are NaN or infinite, which would be read as 0 or spoil the "
            "normalisation; replace them with numbers, such as the image's smallest"
        )
    elif array.min() == array.max():
        found.notes.append(f"case {case!r}: {path} holds one value only, {array.flat[0]:g}")
    return array, Grid.of(array, properties)


def _label(path: Path, case: str, dataset: RawDataset, found: Findings) -> Grid | None:
    try:
        array, properties = read_labels(path, dataset.dataset_json)
    except NotLabelsError as error:
        found.defects.append(f"case {case!r}: {error}; write whole numbers into it")
        return None
    except (ImageFileError, MemoryError) as error:
        found.defects.append(f"case {case!r}: {str(error) or f'{path} does not fit into memory'}")
        return None
    manager = LabelManager(dataset.dataset_json["labels"], dataset.dataset_json.get("regions_class_order"))
    named = {int(label) for label in manager.all_labels}
    if manager.ignore_label is not None:
        named.add(int(manager.ignore_label))
    values = {int(value) for value in np.unique(np.rint(array))}
    if values - named:
        found.defects.append(
            f"case {case!r}: {path} holds the labels {', '.join(map(str, sorted(values - named)[:10]))}, which "
            "dataset.json does not name; add them there or correct the label map"
        )
    elif values == {0}:
        found.notes.append(f"case {case!r}: {path} holds background only")
    return Grid.of(array, properties)
