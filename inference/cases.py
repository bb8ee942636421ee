"""Cases to predict: find them in a folder, read and check their images, preprocess them as nnU-Net does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray

from masksam_nnunet.errors import CaseError, DataError, UsageError, in_short
from masksam_nnunet.plans.images import ImageGeometry, check_whole, read_image, times_apart, twice_placed

_OTHER_UNIT = 100.0  # times as large as in training: metres or micrometres


@dataclass(frozen=True)
class Case:
    """An image to predict.

    Attributes:
        name: of its files, without channel and ending; its label map gets this name.
        files: one for each channel, or one that holds all channels, as in nnU-Net.
        numbered: whether the files' names hold channel numbers, as in nnU-Net's folders.
    """

    name: str
    files: tuple[Path, ...]
    numbered: bool = True


def find_cases(folder: Path, ending: str) -> tuple[list[Case], dict[str, str]]:
    """Find the cases of a folder, sorted by name, and what is wrong with files that belong to none, by file.

    Files are named ``CASE_0000`` + ending, ``CASE_0001`` + ending, ...

    Raises:
        UsageError: the folder is missing, not readable, empty, or without any such file.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"-i {folder}: {error.strerror or error}; name a readable folder of images") from error
    files: dict[str, list[Path]] = {}
    odd: dict[str, str] = {}
    for name in names:
        if not name.endswith(ending):
            continue
        numbered = re.fullmatch(r"(.+)_\d{4}", name.removesuffix(ending))
        if numbered:
            files.setdefault(numbered[1], []).append(folder / name)
        else:
            odd[name] = f"no channel number in its name; rename it to {name.removesuffix(ending)}_0000{ending}"
    if not files:
        there = f"only {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else "the folder is empty"
        raise UsageError(f"-i {folder}: no image is named CASE_0000{ending}; {there}")
    return [Case(name, tuple(files[name])) for name in sorted(files)], odd


def read_case(
    case: Case, reader: Any, dataset_json: Mapping[str, Any]
) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """Read the image (C, D, H, W), to its last voxel, and nnU-Net's properties.

    ``reader`` is one of nnU-Net's; ``dataset_json`` is the model's.

    Raises:
        CaseError: a file cannot be read or used, see :func:`read_image`, or lies on another grid than the first one;
            the channels are not the model's.
    """
    channels = channel_names(dataset_json)
    if case.numbered:
        numbers = [int(re.findall(r"_(\d{4})\.", file.name)[-1]) for file in case.files]
        if numbers != list(range(len(numbers))):
            raise CaseError(f"it has the channels {numbers}, but channels are numbered 0, 1, ... without gaps")
    volumes = [_read_file(file, reader, dataset_json) for file in case.files]
    if note := twice_placed(case.files[0]):
        print(f"note: {note}. The label map lies where {type(reader).__name__} places the image", flush=True)
    array, properties = volumes[0]
    for file, (other, its_properties) in zip(case.files[1:], volumes[1:], strict=True):
        difference = ImageGeometry.of(array, properties).difference(ImageGeometry.of(other, its_properties))
        if difference is not None:
            what, one, two = difference
            raise CaseError(f"{case.files[0].name} and {file.name} differ in {what} ({one} and {two}): resample them")
    data = array if len(volumes) == 1 else np.concatenate([volume for volume, _ in volumes])
    if len(data) != len(channels):
        raise CaseError(
            f"{', '.join(file.name for file in case.files)}: {len(data)} channels, but the model was trained on "
            f"{len(channels)} ({', '.join(channels)})"
        )
    return data, properties


def preprocess_case(
    case: Case,
    previous: Path | None,
    plans: Any,
    configuration: Any,
    dataset_json: Mapping[str, Any],
    verbose: bool,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Make the network's input, (C, x, y, z), and nnU-Net's properties.

    ``previous`` is the label map of the previous stage, for a cascade; ``plans`` and ``configuration`` are nnU-Net's
    managers.

    Raises:
        CaseError: see :func:`read_case`; or the voxels' size is of another unit than in training; or the previous
            stage's label map is missing, damaged or of another grid.
    """
    reader = plans.image_reader_writer_class()
    data, properties = read_case(case, reader, dataset_json)
    grid = ImageGeometry.of(data, properties)
    _require_size(grid, len(data), plans, configuration)
    segmentation = None if previous is None else _read_previous(previous, reader, grid)
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    data, segmentation, properties = preprocessor.run_case_npy(
        data, segmentation, properties, plans, configuration, dataset_json
    )
    if previous is not None:
        labels = plans.get_label_manager(dataset_json).foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype)))
    return np.ascontiguousarray(data, np.float32), properties


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The channels of a dataset.json, in order; older ones call them modalities."""
    channels = dataset_json.get("channel_names") or dataset_json["modality"]
    return [str(channels[key]) for key in sorted(channels, key=int)]


def _read_file(
    file: Path, reader: Any, dataset_json: Mapping[str, Any]
) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    try:
        return read_image(file, dataset_json, reader)
    except DataError as error:
        raise CaseError(str(error)) from error


def _require_size(grid: ImageGeometry, channels: int, plans: Any, configuration: Any) -> None:
    """Refuse voxels whose unit must be another than in training, and what no memory holds once it is resampled."""
    usual = [plans.original_median_spacing_after_transp[axis] for axis in plans.transpose_backward]
    spacing = [grid.spacing[axis] for axis in plans.transpose_forward][-len(configuration.spacing) :]
    voxels = math.prod(grid.shape) * math.prod(np.divide(spacing, configuration.spacing))
    if times_apart(grid.spacing, usual) >= _OTHER_UNIT or 4 * channels * voxels > psutil.virtual_memory().total:
        found, known = ("x".join(f"{step:.3g}" for step in steps) for steps in (grid.spacing, usual))
        raise CaseError(
            f"its voxels measure {found} mm, those of the training images {known}, so that it would be resampled to "
            f"{voxels:.3g} voxels: does the header mean another unit? Correct its voxel size"
        )


def _read_previous(file: Path, reader: Any, grid: ImageGeometry) -> NDArray[np.floating[Any]]:
    try:
        check_whole(file)
        segmentation, properties = reader.read_seg(str(file))
    except Exception as error:
        raise CaseError(
            f"{file}, the previous stage's prediction, is missing or damaged: predict it first ({in_short(error)})"
        ) from error
    difference = grid.difference(ImageGeometry.of(segmentation, properties))
    if difference is not None:
        what, one, two = difference
        raise CaseError(f"{file}, the previous stage's prediction, differs from the image in {what} ({one} and {two})")
    return segmentation
