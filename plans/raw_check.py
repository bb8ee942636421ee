"""Reads every file of a raw dataset for ``masksam check`` and lists all defects.

nnU-Net's ``--verify_dataset_integrity`` stops at the first kind of defect, misses NaN in a NIfTI file and truncated
files, since ITK reads over both, and only warns where image and label lie at different places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from numpy.typing import NDArray

from masksam_nnunet.errors import DataError

from .images import (
    ImageGeometry,
    dataset_reader,
    in_threads,
    label_values,
    read_image,
    read_labels,
    times_apart,
    twice_placed,
)
from .raw_data import RawDataset, inspect_raw_dataset, number_of, shortened
from .splits import SPLITS_FILE, overlaps, read_splits

_ODD, _IMPOSSIBLE = 10.0, 1000.0
"""Voxels that are so many times as large as usual, or as long as wide, are noted."""
_SMALLEST, _LARGEST = 0.005, 200.0
"""Millimetres of voxels that are noted beyond."""


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
    labels: set[int] = field(default_factory=set)
    intensities: list[Any] = field(default_factory=list)
    """Of labelled foreground by channel, where nnU-Net's statistics have to be corrected."""
    image_hash: bytes | None = None


def check_raw_dataset(folder: Path, preprocessed: Path | None = None) -> RawCheck:
    """Read a raw dataset to its last voxel, and splits_final.json there and in its ``preprocessed`` folder.

    Raises:
        DataError: it cannot be listed at all.
    """
    number = number_of(folder.name)
    dataset, defects = inspect_raw_dataset(folder)
    notes: list[str] = []
    for file in (part / SPLITS_FILE for part in (dataset.folder, preprocessed) if part is not None):
        try:
            if file.is_file():
                defects += [f"{file}: {text}" for text in overlaps(read_splits(file, dataset.images))]
        except DataError as error:
            defects.append(str(error))
    cases = in_threads(partial(_check_case, dataset, _reader(dataset)), list(dataset.images), "checking")
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
    placed = {
        name: next(iter(case.geometries.values()))
        for name, case in zip(dataset.images, cases, strict=True)
        if case.geometries
    }
    notes += _spacing_notes(placed)
    defects += _thin(placed)
    if all(case.labels for case in cases):
        found = set().union(*(case.labels for case in cases))
        if not found - {0, dataset.label_manager.ignore_label}:
            defects.append("no label map holds any foreground, so there is nothing to learn")
        notes += _label_notes(dataset, found)
    if drawn := [case.intensities for case in cases if any(map(len, case.intensities))]:
        notes.append(_statistics_note(dataset, drawn))
    if len(alike := find_candidate_datasets(number)) > 1:
        notes.append(f"nnU-Net finds several datasets by the number {number}: {', '.join(alike)}; give it a full name")
    return RawCheck(dataset, tuple(defects), tuple(notes))


def require_sound_dataset(folder: Path) -> None:
    """Raise a DataError with the first defects of a raw dataset, before work that would take longer."""
    defects = list(check_raw_dataset(folder).defects)
    if defects:
        raise DataError(f"{folder} cannot be used:\n  " + shortened(defects, "\n  "))


def _reader(dataset: RawDataset) -> Any:
    """nnU-Net's for all files; None, for each file its own, where the first image is missing or damaged."""
    files = [file for images in dataset.images.values() for file in images]
    try:
        return dataset_reader(dataset.dataset_json, files[0]) if files else None
    except (DataError, OSError):
        return None


def _spacing_notes(geometries: Mapping[str, ImageGeometry]) -> list[str]:
    """Voxel sizes that differ much from the median of all cases, or between axes, or are none of a patient."""
    notes: list[str] = []
    usual = _usual_spacing(geometries)
    for case, geometry in geometries.items():
        size, known = ("x".join(f"{step:.3g}" for step in steps) for steps in (geometry.spacing, usual))
        steps = [step for step, count in zip(geometry.spacing, geometry.shape, strict=True) if count > 1] or [1.0]
        if times_apart(geometry.spacing, usual) >= _ODD:
            notes.append(f"case {case!r} has voxels of {size} mm, others of {known}: is its unit millimetres?")
        elif max(steps) >= _IMPOSSIBLE * min(steps) or max(steps) > _LARGEST or min(steps) < _SMALLEST:
            notes.append(f"case {case!r} has voxels of {size} mm: is that right?")
    return notes


def _usual_spacing(geometries: Mapping[str, ImageGeometry]) -> NDArray[np.floating[Any]]:
    return np.median([geometry.spacing for geometry in geometries.values()] or [(1.0, 1.0, 1.0)], axis=0)


def _thin(geometries: Mapping[str, ImageGeometry]) -> list[str]:
    """What is wrong with single slices that do not lie along the axis that nnU-Net takes for that across slices."""
    across = int(np.argmax(_usual_spacing(geometries)))
    thin = [case for case, geometry in geometries.items() if geometry.shape[across] > 1 and 1 in geometry.shape]
    if 2 * len(thin) <= len(geometries):
        return []
    shape, axis = "x".join(map(str, geometries[thin[0]].shape)), ("slices", "rows", "columns")[across]
    return [
        f"{len(thin)} cases are single slices, such as {thin[0]!r} of {shape} voxels (slices, rows, columns), which "
        f"nnU-Net would cut into lines, along the {axis}, where voxels are largest: store them as 1xHxW, with voxels "
        "that are largest across the slice"
    ]


def _label_notes(dataset: RawDataset, found: set[int]) -> list[str]:
    """What nnU-Net makes of the labels that were ``found``, if it may surprise."""
    manager = dataset.label_manager
    notes: list[str] = []
    if manager.has_regions:
        values = np.array(sorted(found - {manager.ignore_label}), int)
        # (R, V, 1, 1): what a perfect prediction gives for a voxel of each value
        perfect = np.stack([np.isin(values, region) for region in manager.foreground_regions])[..., None, None]
        back = np.ravel(manager.convert_probabilities_to_segmentation(perfect.astype(np.float32)))
        lost = [f"{one} becomes {other}" for one, other in zip(values, back, strict=True) if one != other]
        if lost:
            notes.append(
                f"regions_class_order {dataset.dataset_json['regions_class_order']}: in label maps, even of a perfect "
                f"prediction, {', '.join(lost)}. Regions overwrite those listed before them: list larger ones first, "
                "and for each the label of the part that no later one holds"
            )
    absent = sorted({int(label) for label in manager.all_labels} - found - {0})
    if absent:
        notes.append(f"no label map holds the labels {', '.join(map(str, absent))}, which dataset.json names")
    return notes


def _needs_statistics(dataset: RawDataset) -> bool:
    """Whether nnU-Net takes ignored voxels of CT for foreground, by whose intensities it clips and scales images."""
    channels = dataset.dataset_json["channel_names"].values()
    return dataset.label_manager.has_ignore_label and "ct" in map(str.casefold, channels)


def _statistics_note(dataset: RawDataset, intensities: Sequence[Sequence[Any]]) -> str:
    """nnU-Net's statistics without the ignore label, from what its function draws of each case and channel."""
    statistics = {}
    for channel, drawn in enumerate(zip(*intensities, strict=True)):
        values = np.concatenate([np.asarray(part, float) for part in drawn])
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5)).tolist()
        known = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        statistics[str(channel)] = {name: round(float(value), 3) for name, value in known.items()} | {
            "median": median,
            "percentile_00_5": low,
            "percentile_99_5": high,
        }
    return (
        f"nnU-Net's intensity statistics of CT count the ignore label {dataset.label_manager.ignore_label} as "
        "foreground. Run nnUNetv2_extract_fingerprint, put those of labelled voxels into dataset_fingerprint.json in "
        "its preprocessed folder, then plan and preprocess: "
        f'"foreground_intensity_properties_per_channel": {json.dumps(statistics)}'
    )


def _read_known_labels(
    dataset: RawDataset, reader: Any, case: str
) -> tuple[NDArray[np.int32], set[int], ImageGeometry]:
    """A case's label map (1, D, H, W), and its values, which dataset.json must name."""
    path = dataset.labels[case]
    array, properties = read_labels(path, dataset.dataset_json, reader)
    labels = np.rint(array).astype(np.int32)
    values = label_values(labels)
    manager = dataset.label_manager
    unknown = sorted(values - {*map(int, manager.all_labels), manager.ignore_label})
    if unknown:
        raise DataError(f"{path} holds the labels {', '.join(map(str, unknown[:10]))}, which dataset.json lacks")
    return labels, values, ImageGeometry.of(array, properties)


def _check_case(dataset: RawDataset, reader: Any, case: str) -> _CaseCheck:
    check = _CaseCheck()
    digest, channels = hashlib.sha256(), 0
    images: list[NDArray[Any]] = []  # where intensities are needed
    files = [*dataset.images[case], dataset.labels[case]]
    for path in filter(Path.is_file, files):
        try:
            if path == files[-1]:
                labels, check.labels, geometry = _read_known_labels(dataset, reader, case)
                one_value = "background only" if check.labels == {0} else ""
            else:
                array, properties = read_image(path, dataset.dataset_json, reader)
                geometry = ImageGeometry.of(array, properties)
                if len(array) > 1 and "sitk_stuff" in properties:
                    check.defects.append(
                        f"case {case!r}: {path} is 4D, with {len(array)} channels: nnU-Net trains on it, but writes "
                        "no predictions for it; give each channel a file, CASE_0000, CASE_0001, ..."
                    )
                one_value = f"one value only, {array.flat[0]:g}" if array.min() == array.max() else ""
                channels += len(array)
                if _needs_statistics(dataset):
                    images.append(array)
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array).data)
            if note := twice_placed(path):
                check.notes.append(f"case {case!r}: {note}")
        except (DataError, MemoryError) as error:
            check.defects.append(f"case {case!r}: {str(error) or f'{path} does not fit into memory'}")
            continue
        check.geometries[str(path)] = geometry
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
    if images and not check.defects:
        foreground = np.where(labels == dataset.label_manager.ignore_label, 0, labels)
        draw = DatasetFingerprintExtractor.collect_foreground_intensities
        check.intensities = draw(foreground, np.concatenate(images))[0]
    return check
