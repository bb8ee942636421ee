"""Cases to predict: found in a folder, read, checked, preprocessed as nnU-Net does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray

from masksam_nnunet.errors import CaseError, PredictError, in_short

from .label_maps import Grid, check_whole, stored_floats


@dataclass(frozen=True)
class Case:
    """An image to predict.

    Attributes:
        name: of its files, without channel and ending; its label map is named so.
        files: one for each channel, or one that holds them all, as in nnU-Net.
        numbered: whether the files' names tell their channels, as in nnU-Net's folders.
    """

    name: str
    files: tuple[Path, ...]
    numbered: bool = True


def find_cases(folder: Path, ending: str) -> tuple[list[Case], dict[str, str]]:
    """The cases of a folder, sorted by name, and what is wrong with files that belong to none, by file.

    Args:
        folder: with files named ``CASE_0000`` + ending, ``CASE_0001`` + ending, ...
        ending: of the model's dataset.

    Raises:
        PredictError: the folder is missing, not readable, empty, or without any such file.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError as error:
        raise PredictError(f"-i {folder}: there is no such folder; name the folder of the images") from error
    except NotADirectoryError as error:
        raise PredictError(f"-i {folder} is a file: name the folder that holds the images") from error
    except OSError as error:
        raise PredictError(f"-i {folder} cannot be read: {error.strerror}; make it readable") from error
    files: dict[str, list[Path]] = {}
    odd: dict[str, str] = {}
    for name in names:
        if not name.endswith(ending):
            continue
        numbered = re.fullmatch(r"(.+)_\d{4}", name.removesuffix(ending))
        if numbered:
            files.setdefault(numbered[1], []).append(folder / name)
        else:
            stem = name.removesuffix(ending)
            odd[name] = f"its name has no channel number: rename it to {stem}_0000{ending}"
    if not files:
        raise PredictError(f"-i {folder}: {_what_is_there(names, odd)}; images are named CASE_0000{ending}")
    return [Case(name, tuple(files[name])) for name in sorted(files)], odd


def _what_is_there(names: Sequence[str], odd: Mapping[str, str]) -> str:
    if not names:
        return "the folder is empty"
    if odd:
        return f"no file has a channel number, such as {next(iter(odd))}"
    endings = sorted({name[name.index(".") :] for name in names if "." in name})
    return (
        f"{len(names)} entries, none with the ending of the model's dataset; there are "
        f"{', '.join(endings[:5]) or 'no files with an ending'}: convert them, or name another folder"
    )


def read_case(case: Case, reader: Any, channels: Sequence[str]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The image (C, D, H, W) and nnU-Net's properties, read to the last voxel.

    Args:
        case: its files.
        reader: one of nnU-Net's.
        channels: names of those the model was trained on, in order.

    Raises:
        CaseError: a file cannot be read, is not whole, holds NaN, or does not lie on the first one's grid; the
            channels are not the model's.
    """
    if case.numbered:
        numbers = [int(re.findall(r"_(\d{4})\.", file.name)[-1]) for file in case.files]
        if numbers != list(range(len(numbers))):
            raise CaseError(f"it has the channels {numbers}, but channels are numbered 0, 1, ... without gaps")
    volumes = [_read_file(file, reader) for file in case.files]
    array, properties = volumes[0]
    grid = Grid.of(array, properties)
    for file, (other, its_properties) in zip(case.files[1:], volumes[1:], strict=True):
        difference = grid.difference(Grid.of(other, its_properties))
        if difference is not None:
            what, one, two = difference
            raise CaseError(
                f"{case.files[0].name} and {file.name} differ in {what} ({one} and {two}): resample all channels onto "
                "the same grid"
            )
    data = array if len(volumes) == 1 else np.concatenate([volume for volume, _ in volumes])
    if len(data) != len(channels):
        raise CaseError(
            f"it has {len(data)} channels ({', '.join(file.name for file in case.files)}), the model was trained on "
            f"{len(channels)} ({', '.join(channels)}): give it these, one file each or all in one"
        )
    return data, properties


def _read_file(file: Path, reader: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
    try:
        if file.stat().st_size == 0:
            raise CaseError(f"{file} is empty (0 bytes): copy it anew")
        check_whole(file)
        array, properties = reader.read_images([str(file)])
    except (CaseError, MemoryError):
        raise
    except Exception as error:  # each reader has errors of its own
        raise CaseError(
            f"{file} cannot be read; it is truncated, damaged or of another format than its name says: copy it anew "
            f"({in_short(error)})"
        ) from error
    odd = max(int((~np.isfinite(values)).sum()) for values in (array, stored_floats(file)))
    if odd:
        raise CaseError(
            f"{file} holds {odd} voxels that are NaN or infinite: put numbers there, such as the image's smallest"
        )
    return array, properties


def preprocess_case(
    case: Case,
    previous: Path | None,
    plans: Any,
    configuration: Any,
    dataset_json: Mapping[str, Any],
    verbose: bool,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the network takes, (C, x, y, z), and nnU-Net's properties.

    Args:
        case: to read.
        previous: label map of the previous stage, for a cascade.
        plans: nnU-Net's PlansManager.
        configuration: its ConfigurationManager.
        dataset_json: the model's.
        verbose: whether nnU-Net's preprocessor tells what it does.

    Raises:
        CaseError: see :func:`read_case`; or the previous stage's label map is missing, damaged or of another grid.
    """
    reader = plans.image_reader_writer_class()
    data, properties = read_case(case, reader, channel_names(dataset_json))
    segmentation = None if previous is None else _read_previous(previous, reader, Grid.of(data, properties))
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    data, segmentation, properties = preprocessor.run_case_npy(
        data, segmentation, properties, plans, configuration, dataset_json
    )
    if previous is not None:
        labels = plans.get_label_manager(dataset_json).foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype)))
    return np.ascontiguousarray(data, np.float32), properties


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Of a dataset.json, in order; older ones call them modalities."""
    channels = dataset_json.get("channel_names") or dataset_json["modality"]
    return [str(channels[key]) for key in sorted(channels, key=int)]


def _read_previous(file: Path, reader: Any, grid: Grid) -> NDArray[np.floating[Any]]:
    try:
        check_whole(file)
        segmentation, properties = reader.read_seg(str(file))
    except Exception as error:
        raise CaseError(
            f"{file}, the previous stage's prediction, is missing or damaged: predict it with that stage's model "
            f"({in_short(error)})"
        ) from error
    difference = grid.difference(Grid.of(segmentation, properties))
    if difference is not None:
        what, one, two = difference
        raise CaseError(f"{file}, the previous stage's prediction, differs from the image in {what} ({one} and {two})")
    result: NDArray[np.floating[Any]] = segmentation
    return result
