"""What all converters share: a description of a download, its check, and writing the dataset atomically."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import nibabel
import numpy as np
from nnunetv2.dataset_conversion.convert_MSD_dataset import split_4d_nifti
from pydantic import Field, TypeAdapter

from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import atomic_folder, read_json, write_json

from ..images import check_whole, in_threads, open_nifti
from ..raw_data import shortened

ENDING = ".nii.gz"
_LABELS = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[0-9]{1,3}$")], str])


@dataclass(frozen=True)
class DownloadedCase:
    """An image of a download, its label map where it has one, and its name and part in the dataset."""

    name: str
    image: Path
    label: Path | None = None
    test: bool = False


@dataclass(frozen=True)
class Download:
    """A challenge's download, and the dataset that it makes.

    Attributes:
        root: the download's folder.
        remedy: what to do where it is incomplete.
        name: the dataset's name, after ``DatasetXXX_``.
        cases: the training cases for imagesTr and labelsTr, the test cases for imagesTs and labelsTs.
        channels: names of the image channels; an image of several is one 4D file.
        labels: of dataset.json.
        about: more entries of dataset.json: reference, licence and the like.
        new_values: the dataset's value for each value 0, 1, ... of the download's label maps; None keeps them.
        defects: what is wrong with the files' names and number.
        finish: writes what else belongs into the dataset's folder.
        processes: worker processes that split images of several channels.
    """

    root: Path
    remedy: str
    name: str
    cases: Sequence[DownloadedCase]
    channels: Sequence[str]
    labels: dict[str, int]
    about: dict[str, Any] = field(default_factory=dict)
    new_values: Sequence[int] | None = None
    defects: Sequence[str] = ()
    finish: Callable[[Path], None] = lambda _: None
    processes: int = 1


def locate(source: Path, inner: Sequence[str], marker: str, remedy: str) -> Path:
    """The first of ``source`` and its folders ``inner`` that holds ``marker``, absolute; a DataError if none does."""
    source = Path(os.path.abspath(source))
    for folder in (source, *(source / name for name in inner)):
        if (folder / marker).exists():
            return folder
    places = ", ".join(str(Path(name) / marker) for name in ("", *inner))
    raise DataError(f"SOURCE {source} holds none of: {places}; {remedy}")


def nifti_names(folder: Path) -> list[str]:
    """Names of the compressed NIfTI files in ``folder``, sorted, without those that macOS adds (``._name``)."""
    return sorted(path.name for path in folder.glob(f"[!._]*{ENDING}"))


def read_description(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of a download's dataset.json, and its labels as nnU-Net's dataset.json has them.

    Raises:
        DataError: it is missing, is not JSON, has no list or object for one of ``keys``, or has other labels than
            ``{"0": "background", "1": NAME, ...}``.
    """
    try:
        content: dict[str, Any] = read_json(path)
        for key in keys:
            if not isinstance(content, dict) or not isinstance(content.get(key), dict | list):
                raise ValueError(f"{key} is missing or not a list")
        labels = _LABELS.validate_python(content["labels"])
        if len(set(labels.values())) != len(labels) or labels.get("0") != "background":
            raise ValueError(f'labels must be {{"0": "background", "1": NAME, ...}}, found {str(labels)[:100]}')
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be used: {in_short(error)}; unpack the download again") from error
    return content, {name: int(value) for value, name in labels.items()}


def listed_cases(entries: Iterable[Any], part: str, path: Path, remedy: str) -> list[str]:
    """Cases in a list of dataset.json: ``{"image": "./imagesTr/la_003.nii.gz", ...}`` or ``"./imagesTs/la_001..."``."""
    images = [str(entry.get("image") if isinstance(entry, dict) else entry).split("/")[-1] for entry in entries]
    for image in images:
        if not image.endswith(ENDING):
            raise DataError(f"{path}: an entry of {part!r} names no image *{ENDING}: {image!r}; {remedy}")
    return [image.removesuffix(ENDING) for image in images]


def free_place(dataset_id: int, raw: Path | None = None) -> Path:
    """The folder that will hold a new dataset: ``raw``, by default $nnUNet_raw.

    Raises:
        DataError: there is no folder, or some folder of nnU-Net holds a dataset of this number.
    """
    if not 1 <= dataset_id <= 999:
        raise DataError(f"-d {dataset_id}: nnU-Net's dataset numbers are 1 to 999")
    theirs = [os.environ.get(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    if raw is None and not theirs[0]:
        raise DataError("nnUNet_raw is not set: export nnU-Net's folders first")
    raw = Path(os.path.abspath(raw or str(theirs[0])))
    for folder in (raw, *map(Path, filter(None, theirs))):
        # The prefix is nnU-Net's own way to find a number.
        taken = [path for path in sorted(folder.glob(f"Dataset{dataset_id:03d}*")) if path.is_dir()]
        if taken:
            raise DataError(f"-d {dataset_id} is taken by {taken[0]}; choose another number, or remove that dataset")
    return raw


def create_dataset(download: Download, dataset_id: int, raw: Path) -> Path:
    """Check a download, then write ``DatasetXXX_Name`` in ``raw``, completely or not at all.

    Raises:
        DataError: the download has defects, or the folder cannot be written.
    """
    require_sound(download)
    folder = raw / f"Dataset{dataset_id:03d}_{download.name}"
    several = len(download.channels) > 1
    to_split = []
    try:
        with atomic_folder(folder) as draft:
            for case in download.cases:
                images, labels = (draft / f"{kind}{'Ts' if case.test else 'Tr'}" for kind in ("images", "labels"))
                images.mkdir(exist_ok=True)
                if several:
                    to_split.append((str(case.image), str(images)))
                else:
                    shutil.copy(case.image, images / f"{case.name}_0000{ENDING}")
                if case.label is not None:
                    labels.mkdir(exist_ok=True)
                    _copy_label(case.label, labels / f"{case.name}{ENDING}", download.new_values)
            if several:
                # A multiprocessing.Pool would wait for ever for a process that was killed for its memory.
                with ProcessPoolExecutor(download.processes, multiprocessing.get_context("spawn")) as pool:
                    list(pool.map(split_4d_nifti, *zip(*to_split, strict=True)))
            description = {
                "channel_names": {str(index): name for index, name in enumerate(download.channels)},
                "labels": download.labels,
                "numTraining": sum(not case.test for case in download.cases),
                "file_ending": ENDING,
            }
            write_json(draft / "dataset.json", download.about | description)
            download.finish(draft)
    except (OSError, RuntimeError) as error:  # RuntimeError: SimpleITK's, or a killed process's
        raise DataError(f"cannot write {folder}: {error}; nothing was kept") from error
    return folder


def require_sound(download: Download) -> None:
    """Refuse a download with missing or damaged files, images of the wrong shape, or unknown labels.

    Every file is read to its end, since a truncated download has a sound header.

    Raises:
        DataError: the first defects and their number, or there is no training case.
    """
    files = [path for case in download.cases for path in (case.image, case.label) if path is not None]
    missing = [f"{path.relative_to(download.root)} is missing" for path in files if not path.is_file()]
    found = [*download.defects, *missing]
    if not found:
        found = list(filter(None, in_threads(partial(_case_defect, download), download.cases, "checking")))
    if found:
        listed = shortened(found, "\n  ")
        raise DataError(
            f"SOURCE {download.root} has {len(found)} defects, nothing was written:\n  {listed}\n{download.remedy}"
        )
    if all(case.test for case in download.cases):
        raise DataError(f"SOURCE {download.root} holds no training case for these options; {download.remedy}")


def _case_defect(download: Download, case: DownloadedCase) -> str:
    """What is wrong with a case's image or label; empty if nothing is."""
    path, channels = case.image, len(download.channels)
    try:
        shape = _shape_of_whole(path)
        expected = 3 if channels == 1 else 4
        if len(shape) != expected or shape[3:] not in ((), (channels,)):
            return f"{path.relative_to(download.root)} has the shape {shape}, expected {channels} channels"
        if case.label is None:
            return ""
        path = case.label
        label_shape = _shape_of_whole(path)
        if label_shape != shape[:3]:
            return f"{path.relative_to(download.root)} has the shape {label_shape}, its image {shape[:3]}"
        values = np.unique(np.asanyarray(open_nifti(path).dataobj)).tolist()
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        return f"{path.relative_to(download.root)} is damaged ({in_short(error)})"
    known = download.labels.values() if download.new_values is None else range(len(download.new_values))
    unknown = ", ".join(f"{value:g}" for value in values if value not in known)
    return f"{path.relative_to(download.root)} has the labels {unknown[:100]}, which are unknown" if unknown else ""


def _shape_of_whole(path: Path) -> tuple[int, ...]:
    check_whole(path)
    return tuple(open_nifti(path).shape)


def _copy_label(label: Path, target: Path, new_values: Sequence[int] | None) -> None:
    if new_values is None:
        shutil.copy(label, target)
        return
    original = open_nifti(label)
    header = original.header.copy()  # with both of NIfTI's affine matrices
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    values = np.array(new_values, np.uint8)[np.asanyarray(original.dataobj).astype(np.intp)]
    nibabel.save(nibabel.Nifti1Image(values, original.affine, header), target)
