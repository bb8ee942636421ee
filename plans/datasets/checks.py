"""Check that a download is complete and undamaged, for all of its files before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json

from ..nifti_files import check_whole
from ..threads import in_threads

ENDING = ".nii.gz"
_SHOWN = 5


@dataclass(frozen=True)
class Volume:
    """One image of a download, its label where it has one, and the channels that the image must have."""

    image: Path
    label: Path | None = None
    channels: int = 1


def locate(source: Path, inner: Sequence[str], marker: str, remedy: str) -> Path:
    """The first of ``source`` and its folders ``inner`` that holds ``marker``, absolute.

    Raises:
        DataError: none does.
    """
    source = Path(os.path.abspath(source))
    if not source.is_dir():
        raise DataError(f"SOURCE {source}: there is no such folder; {remedy}")
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


def open_nifti(path: Path) -> nibabel.Nifti1Image:
    """The image in a file, its values not yet read; errors are nibabel's, ValueError for another format."""
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise ValueError(f"not a NIfTI file but {type(image).__name__}")
    return image


def read_description(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The content of a download's dataset.json, which must have ``keys``.

    Raises:
        DataError: it is missing, is not JSON, or lacks a key.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; unpack the download again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it is not the official one; unpack the download again")
    odd = [key for key in keys if not isinstance(content[key], dict | list)]
    if odd:
        raise DataError(
            f"{path}: {odd[0]} is {content[odd[0]]!r}, no list: it is not the official one; unpack it again"
        )
    description: dict[str, Any] = content
    return description


def described_labels(description: dict[str, Any], path: Path) -> frozenset[int]:
    """The label values in a download's dataset.json, ``{"0": "background", "1": "spleen", ...}``.

    Raises:
        DataError: they are not numbers with one name each, or there is no background 0.
    """
    labels = description["labels"]
    if (
        not isinstance(labels, dict)
        or not all(str(value).isdigit() for value in labels)
        or len(set(labels.values())) != len(labels)
        or labels.get("0") != "background"
    ):
        raise DataError(
            f'{path}: "labels" must be {{"0": "background", "1": NAME, ...}} with different names, found {labels!r}; '
            "unpack the download again"
        )
    return frozenset(int(value) for value in labels)


def require_sound(
    source: Path, volumes: Sequence[Volume], labels: Iterable[int], remedy: str, defects: Sequence[str] = ()
) -> None:
    """Refuse a download with missing or damaged files, images of the wrong form, or labels that do not fit.

    Every file is read to its end, since a download that broke off has a sound header.

    Args:
        source: the folder that messages give paths relative to.
        volumes: what must be there.
        labels: the values that may occur in label files.
        remedy: what the user can do about it.
        defects: what the caller found already.

    Raises:
        DataError: naming the first few defects and their number.
    """
    files = [path for volume in volumes for path in (volume.image, volume.label) if path is not None]
    absent = [f"{path.relative_to(source)} is missing" for path in files if not path.is_file()]
    _refuse(source, [*defects, *absent], remedy)

    examine = partial(_examine, source, frozenset(labels))
    found = [defect for result in in_threads(examine, volumes, "checking") for defect in result]
    _refuse(source, found, remedy)


def _refuse(source: Path, defects: Sequence[str], remedy: str) -> None:
    if not defects:
        return
    more = f"\n  ... and {len(defects) - _SHOWN} more" if len(defects) > _SHOWN else ""
    shown = "".join(f"\n  {defect}" for defect in defects[:_SHOWN])
    count = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
    raise DataError(f"SOURCE {source} has {count}, nothing was written:{shown}{more}\n{remedy}")


def _examine(source: Path, labels: frozenset[int], volume: Volume) -> list[str]:
    """What is wrong with one image and its label."""
    path = volume.image
    try:
        shape = _whole_shape(path)
        expected = 3 if volume.channels == 1 else 4
        if len(shape) != expected or shape[3:] not in ((), (volume.channels,)):
            form = "3 dimensions" if expected == 3 else f"4 dimensions, {volume.channels} in the last"
            return [f"{path.relative_to(source)} has the shape {shape}, expected {form}"]
        if volume.label is None:
            return []
        path = volume.label
        label_shape = _whole_shape(path)
        if label_shape != shape[:3]:
            return [f"{path.relative_to(source)} has the shape {label_shape}, its image {shape[:3]}"]
        values = np.unique(np.asanyarray(open_nifti(path).dataobj)).tolist()
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        return [f"{path.relative_to(source)} is damaged: {' '.join(str(error).split())[:150] or type(error).__name__}"]
    foreign = [value for value in values if value not in labels]
    if foreign:
        listed = ", ".join(f"{value:g}" for value in foreign[:_SHOWN])
        return [f"{path.relative_to(source)} has the labels {listed}, expected {min(labels)} to {max(labels)}"]
    return []


def _whole_shape(path: Path) -> tuple[int, ...]:
    """The shape of a NIfTI file, once it is read to its end and its checksum is right."""
    check_whole(path)
    return tuple(open_nifti(path).shape)
