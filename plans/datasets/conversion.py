"""What all converters share: checking a download before anything is written, and writing the dataset atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import read_json, write_json

from ..images import check_whole, in_threads, open_nifti
from ..raw_data import shortened

ENDING = ".nii.gz"
_LABELS = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[0-9]{1,3}$")], str])


@dataclass(frozen=True)
class DownloadedImage:
    """One image of a download, its label map where it has one, and the channels that the image must have."""

    image: Path
    label: Path | None = None
    channels: int = 1


@dataclass(frozen=True)
class Conversion:
    """A checked download.

    Attributes:
        name: the dataset's name, after ``DatasetXXX_``.
        training: the cases that imagesTr and labelsTr must hold, as nnU-Net names them.
        test: the cases that imagesTs must hold.
        labelled_test: labelsTs must hold the test cases' labels.
        channels: files of each image.
        about: entries for dataset.json: reference, licence and the like.
        write: called with a folder and the dataset's number, writes ``DatasetXXX_Name`` there.
    """

    name: str
    training: tuple[str, ...]
    test: tuple[str, ...]
    about: dict[str, Any]
    write: Callable[[Path, int], None]
    labelled_test: bool = False
    channels: int = 1


def locate(source: Path, inner: Sequence[str], marker: str, remedy: str) -> Path:
    """The first of ``source`` and its folders ``inner`` that holds ``marker``, absolute.

    Raises:
        DataError: none does.
    """
    source = Path(os.path.abspath(source))
    for folder in (source, *(source / name for name in inner)):
        if (folder / marker).exists():
            return folder
    places = ", ".join(str(Path(name) / marker) for name in ("", *inner))
    raise DataError(f"SOURCE {source} holds none of: {places}; {remedy}")


def nifti_names(folder: Path) -> list[str]:
    """Names of the compressed NIfTI files in ``folder``, sorted, without those that macOS adds (``._name``)."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(ENDING) and not p.name.startswith((".", "_")))


def read_description(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], frozenset[int]]:
    """The content of a download's dataset.json, and its label values.

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
    return content, frozenset(map(int, labels))


def listed_cases(entries: Iterable[Any], part: str, path: Path, remedy: str) -> list[str]:
    """Cases in a list of dataset.json: ``{"image": "./imagesTr/la_003.nii.gz", ...}`` or ``"./imagesTs/la_001..."``.

    Raises:
        DataError: an entry names no image.
    """
    images = [str(entry.get("image") if isinstance(entry, dict) else entry).split("/")[-1] for entry in entries]
    for image in images:
        if not image.endswith(ENDING):
            raise DataError(f"{path}: an entry of {part!r} names no image *{ENDING}: {image!r}; {remedy}")
    return [image.removesuffix(ENDING) for image in images]


def require_sound(
    source: Path, images: Sequence[DownloadedImage], labels: Iterable[int], remedy: str, defects: Sequence[str] = ()
) -> None:
    """Refuse a download with missing or damaged files, images of the wrong shape, or unknown labels.

    Every file is read to its end, since a truncated download has a sound header. ``labels`` are the values that may
    occur in label files, and ``defects`` what the caller found already.

    Raises:
        DataError: the first defects and their number.
    """
    files = [path for image in images for path in (image.image, image.label) if path is not None]
    found = [*defects, *(f"{path.relative_to(source)} is missing" for path in files if not path.is_file())]
    if not found:
        for result in in_threads(partial(_image_defects, source, frozenset(labels)), images, "checking"):
            found += result
    if found:
        listed = shortened(found, "\n  ")
        raise DataError(f"SOURCE {source} has {len(found)} defects, nothing was written:\n  {listed}\n{remedy}")


def _image_defects(source: Path, labels: frozenset[int], image: DownloadedImage) -> list[str]:
    """What is wrong with one image and its label."""
    path = image.image
    try:
        shape = _shape_of_whole(path)
        expected = 3 if image.channels == 1 else 4
        if len(shape) != expected or shape[3:] not in ((), (image.channels,)):
            return [f"{path.relative_to(source)} has the shape {shape}, expected {expected} dimensions"]
        if image.label is None:
            return []
        path = image.label
        label_shape = _shape_of_whole(path)
        if label_shape != shape[:3]:
            return [f"{path.relative_to(source)} has the shape {label_shape}, its image {shape[:3]}"]
        values = np.unique(np.asanyarray(open_nifti(path).dataobj)).tolist()
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        return [f"{path.relative_to(source)} is damaged ({in_short(error)})"]
    unknown = [value for value in values if value not in labels]
    if unknown:
        listed = ", ".join(f"{value:g}" for value in unknown[:5])
        return [f"{path.relative_to(source)} has the labels {listed}, expected {min(labels)} to {max(labels)}"]
    return []


def _shape_of_whole(path: Path) -> tuple[int, ...]:
    check_whole(path)
    return tuple(open_nifti(path).shape)


def free_place(dataset_id: int, raw: Path | None = None) -> Path:
    """The folder that will hold a new dataset: ``raw``, by default $nnUNet_raw.

    Raises:
        DataError: there is no folder, or some folder of nnU-Net holds a dataset of this number.
    """
    if not 1 <= dataset_id <= 999:
        raise DataError(f"-d {dataset_id}: nnU-Net's dataset numbers are 1 to 999")
    if raw is None:
        if not os.environ.get("nnUNet_raw"):
            raise DataError("nnUNet_raw is not set: export nnU-Net's folders first")
        raw = Path(os.environ["nnUNet_raw"])
    raw = Path(os.path.abspath(raw))
    others = [os.environ.get(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    for folder in (raw, *(Path(other) for other in others if other)):
        # The prefix is nnU-Net's own way to find a number.
        taken = [path for path in sorted(folder.glob(f"Dataset{dataset_id:03d}*")) if path.is_dir()]
        if taken:
            raise DataError(f"-d {dataset_id} is taken by {taken[0]}; choose another number, or remove that dataset")
    return raw


def place(conversion: Conversion, dataset_id: int, raw: Path) -> Path:
    """Write the dataset into a hidden folder in ``raw``, complete it, and move it to its place.

    Raises:
        DataError: the converter fails or leaves out files, or the folder cannot be written; nothing is kept.
    """
    name = f"Dataset{dataset_id:03d}_{conversion.name}"
    staging = raw / f".{name}.partial"
    if staging.exists():
        raise DataError(f"{staging} exists: wait for that conversion, or remove the folder if it was killed")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write into {raw}: {error}") from error
    try:
        conversion.write(staging, dataset_id)
        _require_complete(staging / name, conversion)
        # nnU-Net compares numTraining with the cases, and some downloads count wrong.
        description = staging / name / "dataset.json"
        more = conversion.about | {"numTraining": len(conversion.training)}
        write_json(description, read_json(description) | more)
        os.replace(staging / name, raw / name)
    except OSError as error:
        raise DataError(f"cannot write {raw / name}: {error}; nothing was kept") from error
    except (AssertionError, RuntimeError, ValueError, LookupError) as error:  # raised by nnunetv2's converters
        raise DataError(f"the conversion to {name} failed: {in_short(error)}; nothing was kept") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return raw / name


def _require_complete(folder: Path, conversion: Conversion) -> None:
    """Every case, and nothing else, must be there: the converters leave out what they do not recognise."""
    for suffix, cases in (("Tr", conversion.training), ("Ts", conversion.test)):
        labelled = suffix == "Tr" or conversion.labelled_test
        images = {f"{case}_{channel:04d}{ENDING}" for case in cases for channel in range(conversion.channels)}
        labels = {f"{case}{ENDING}" for case in cases} if labelled else set()
        for part, wanted in ((f"images{suffix}", images), (f"labels{suffix}", labels)):
            different = sorted({path.name for path in (folder / part).glob("*")} ^ wanted)
            if different:
                raise DataError(
                    f"{folder.name}/{part} would not hold what the download holds: {len(different)} files are missing "
                    f"or unexpected ({', '.join(different[:3])}). Is this the official download?"
                )
