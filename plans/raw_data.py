"""Check a raw dataset before nnU-Net reads it, and put it where nnU-Net looks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json

from .description import description_defects
from .splits import NUM_FOLDS

_SHOWN = 5
_NAME = re.compile(r"Dataset(\d{3})_\w[\w.-]*")


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset that nnU-Net can work on.

    Attributes:
        folder: its folder, named as the dataset.
        dataset_json: the content of its dataset.json.
        images: files of each training case, one per channel, by case name.
        labels: file of each training case's label map, by case name.
    """

    folder: Path
    dataset_json: dict[str, Any]
    images: dict[str, tuple[Path, ...]]
    labels: dict[str, Path]

    @property
    def name(self) -> str:
        """Such as ``Dataset004_Hippocampus``."""
        return self.folder.name

    @property
    def number(self) -> str:
        """The dataset's number as nnU-Net's option -d takes it."""
        return str(number_of(self.name))

    @property
    def test_images(self) -> Path:
        """Folder of images to predict: imagesTs where it holds any, else imagesTr."""
        tests = self.folder / "imagesTs"
        return tests if tests.is_dir() and any(tests.iterdir()) else self.folder / "imagesTr"


def number_of(name: str) -> int:
    """The number of ``DatasetXXX_Name``."""
    return int(name[len("Dataset") : len("Dataset000")])


def read_raw_dataset(folder: Path, option: str = "--data", min_cases: int = NUM_FOLDS) -> RawDataset:
    """Read and check a raw dataset.

    Args:
        folder: ``DatasetXXX_Name``.
        option: what the user named it by, for the messages.
        min_cases: fewest training cases.

    Raises:
        DataError: naming what is missing or wrong, and what nnU-Net expects.
    """
    folder = Path(os.path.abspath(folder))  # not resolve(): a link's own name is the dataset's name
    if not folder.is_dir():
        raise DataError(f"{option} {folder}: there is no such folder")
    if not _NAME.fullmatch(folder.name):
        raise DataError(
            f"{option} {folder}: the folder's name must be DatasetXXX_Name with three digits, such as "
            f"Dataset004_Hippocampus, not {folder.name!r}; rename it or make a link of that name"
        )
    description = _read_description(folder, option)
    dataset, defects = _inspect(folder, description, option, min_cases)
    if defects:
        more = f"; and {len(defects) - _SHOWN} more, which masksam check lists" if len(defects) > _SHOWN else ""
        raise DataError(f"{option} {folder}: {'; '.join(defects[:_SHOWN])}{more}")
    return dataset


def inspect_raw_dataset(folder: Path, option: str = "-d") -> tuple[RawDataset, list[str]]:
    """A raw dataset as far as it can be listed, and all that is wrong with its files' names and number.

    Raises:
        DataError: the folder or its dataset.json cannot be used at all.
    """
    folder = Path(os.path.abspath(folder))
    return _inspect(folder, _read_description(folder, option), option, 1)


def _inspect(folder: Path, description: dict[str, Any], option: str, min_cases: int) -> tuple[RawDataset, list[str]]:
    if "dataset" not in description:  # else dataset.json lists the files itself
        for part in ("imagesTr", "labelsTr"):
            if not (folder / part).is_dir():
                raise DataError(f"{option} {folder}: the folder {part} is missing; nnU-Net's raw format needs it")
    files, defects = (
        _listed_files(folder, description) if "dataset" in description else _found_files(folder, description)
    )
    if len(files) < min_cases:
        raise DataError(
            f"{option} {folder}: {len(files)} training cases ending in {description['file_ending']!r}; "
            f"at least {min_cases} are needed" + (f" ({'; '.join(defects[:_SHOWN])})" if defects else "")
        )
    channels = len(description["channel_names"])
    usual = Counter(len(images) for images, _ in files.values()).most_common(1)[0][0]
    for case, (images, label) in files.items():
        # Fewer files than channels are legal: a colour image, or a 4D file, holds several.
        if len(images) > channels or len(images) != usual:
            defects.append(
                f"case {case!r} has {len(images)} image files, others have {usual}, and "
                f"channel_names in dataset.json has {channels} entries; files are named CASE_0000, CASE_0001, ..."
            )
        defects += [
            f"case {case!r} has no {path.name}; add it or remove the case"
            for path in (*images, label)
            if not path.is_file()
        ]
    if description["numTraining"] != len(files):
        defects.append(
            f"dataset.json says numTraining = {description['numTraining']}, there are {len(files)} training cases; "
            "add what is missing or correct the number"
        )
    images_of = {case: images for case, (images, _) in files.items()}
    label_of = {case: label for case, (_, label) in files.items()}
    return RawDataset(folder, description, images_of, label_of), defects


_Files = dict[str, tuple[tuple[Path, ...], Path]]


def _listed_files(folder: Path, description: dict[str, Any]) -> tuple[_Files, list[str]]:
    """Images and label of each case that dataset.json lists, by nnU-Net's rules."""
    # A copy: nnU-Net's function changes the description.
    found = get_filenames_of_train_images_and_targets(str(folder), json.loads(json.dumps(description)))
    files = {
        str(case): (tuple(Path(image) for image in entry["images"]), Path(entry["label"]))
        for case, entry in sorted(found.items())
    }
    return files, [f"case {case!r} has no image in dataset.json" for case, (images, _) in files.items() if not images]


def _found_files(folder: Path, description: dict[str, Any]) -> tuple[_Files, list[str]]:
    """Images and label of each case in imagesTr and labelsTr, and what is wrong with their names.

    nnU-Net cuts a file's name at a fixed length, and so takes a misnamed file for a case of another name.
    """
    ending = description["file_ending"]
    images: dict[str, dict[int, Path]] = {}
    defects = []
    for path in sorted((folder / "imagesTr").iterdir()):
        if not path.name.endswith(ending):
            continue
        named = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if named is None or named[1].startswith("."):
            defects.append(f"imagesTr/{path.name} is not named CASE_0000{ending}; rename or remove it")
        else:
            images.setdefault(named[1], {})[int(named[2])] = path
    for case, channels in images.items():
        if sorted(channels) != list(range(len(channels))):
            numbers = ", ".join(f"{channel:04d}" for channel in sorted(channels))
            defects.append(f"case {case!r} has the channels {numbers}; they are numbered from 0000 without gaps")
    labels = {path.name.removesuffix(ending) for path in (folder / "labelsTr").iterdir() if path.name.endswith(ending)}
    defects += [
        f"labelsTr/{case}{ending} has no image; add imagesTr/{case}_0000{ending} or remove it"
        for case in sorted(labels - set(images))
    ]
    files = {
        case: (tuple(path for _, path in sorted(channels.items())), folder / "labelsTr" / f"{case}{ending}")
        for case, channels in sorted(images.items())
    }
    return files, defects


def place_raw_dataset(dataset: RawDataset, raw: Path) -> RawDataset:
    """Link the dataset into the folder ``raw``, or copy it where links are not possible; returns it as it is there."""
    raw.mkdir(parents=True, exist_ok=True)
    target = raw / dataset.name
    if not target.exists():
        try:
            target.symlink_to(dataset.folder, target_is_directory=True)
        except OSError:  # Windows without the privilege, file systems without links
            shutil.copytree(dataset.folder, target)
    return read_raw_dataset(target)


def _read_description(folder: Path, option: str) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(f"{option} {folder}: dataset.json is missing; nnU-Net's raw format needs it")
    try:
        description = read_json(path)
    except ValueError as error:
        raise DataError(f"{option} {folder}: dataset.json is not JSON: {error}; write it again, in UTF-8") from error
    except OSError as error:
        raise DataError(f"{option} {folder}: dataset.json cannot be read: {error.strerror or error}") from error
    defects = description_defects(description)
    if defects:
        raise DataError(f"{option} {folder}: {'; '.join(defects)}")
    result: dict[str, Any] = description
    return result
