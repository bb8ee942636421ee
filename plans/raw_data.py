"""A dataset in nnU-Net's raw format: its dataset.json and its files' names, checked before nnU-Net reads them."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, ValidationInfo, field_validator

from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import read_json

NUM_FOLDS = 5
"""nnU-Net's."""
SHOWN = 5
"""Defects that an error lists; ``masksam check`` lists all."""
_NAME = re.compile(r"Dataset(\d{3,})_.+")


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset that nnU-Net can work on: its folder, dataset.json, and files by the names of training cases."""

    folder: Path
    dataset_json: dict[str, Any]
    images: dict[str, tuple[Path, ...]]
    """One file per channel, unless a file holds several."""
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
    def label_manager(self) -> LabelManager:
        """nnU-Net's, of the labels and regions in dataset.json."""
        return LabelManager(dict(self.dataset_json["labels"]), self.dataset_json.get("regions_class_order"))

    @property
    def test_images(self) -> Path:
        """Folder of images to predict: imagesTs where it holds any, else imagesTr."""
        tests = self.folder / "imagesTs"
        return tests if tests.is_dir() and any(tests.iterdir()) else self.folder / "imagesTr"


def number_of(name: str, given: str = "") -> int:
    """The number of ``DatasetXXX_Name``; a DataError for another form, which says how the name was ``given``."""
    named = _NAME.fullmatch(name)
    if named is None:
        raise DataError(f"{given or name}: rename or link the folder as DatasetXXX_Name, such as Dataset004_Liver")
    return int(named[1])


def datasets_in(folder: Path, dataset: str) -> list[str]:
    """The full names of a folder's datasets that a number or a full name means, sorted."""
    present = sorted(path.name for path in folder.glob("Dataset*") if path.is_dir())
    if not dataset.isdecimal():
        return [name for name in present if name == dataset]
    return [name for name in present if name.startswith(f"Dataset{int(dataset):03d}_")]


def find_dataset(
    dataset: str, variables: Sequence[str] = ("nnUNet_raw", "nnUNet_preprocessed"), option: str = "-d"
) -> str:
    """The full name of a dataset given by number or name, in the folder that the first of ``variables`` names.

    Raises:
        DataError: a variable is not set, or the folder holds no such dataset.
    """
    for variable in variables:
        if not os.environ.get(variable):
            raise DataError(f"{variable} is not set: export nnU-Net's folders {' and '.join(variables)} first")
    folder = Path(os.environ[variables[0]])
    found = datasets_in(folder, dataset)
    if len(found) > 1:
        raise DataError(f"{option} {dataset}: several datasets have this number: {', '.join(found)}; give a full name")
    if not found:
        there = ", ".join(sorted(path.name for path in folder.glob("Dataset*"))) or "it has none"
        raise DataError(f"{option} {dataset}: no such dataset in {variables[0]} = {folder}: {there}")
    return found[0]


def read_raw_dataset(folder: Path, option: str = "--data", min_cases: int = NUM_FOLDS) -> RawDataset:
    """Read and check a raw dataset's dataset.json and file names; ``option`` names the folder in messages.

    Raises:
        DataError: the first defects, or there are fewer than ``min_cases`` training cases.
    """
    folder = Path(os.path.abspath(folder))  # not resolve(): a link's own name is the dataset's name
    if not folder.is_dir():
        raise DataError(f"{option} {folder}: there is no such folder")
    number_of(folder.name, f"{option} {folder}")
    dataset, defects = inspect_raw_dataset(folder, option, min_cases)
    if defects:
        raise DataError(f"{option} {folder}: {shortened(defects)}")
    return dataset


def inspect_raw_dataset(folder: Path, option: str = "-d", min_cases: int = 1) -> tuple[RawDataset, list[str]]:
    """List a raw dataset's files, with every defect of their names and number.

    Raises:
        DataError: the folder or its dataset.json cannot be used at all.
    """
    folder = Path(os.path.abspath(folder))
    try:
        description = read_json(folder / "dataset.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{option} {folder}: dataset.json is missing or damaged: {in_short(error)}") from error
    if broken := description_defects(description):
        raise DataError(f"{option} {folder}: dataset.json: {'; '.join(broken)}")
    if "dataset" in description:  # dataset.json lists the files itself
        files, defects = _listed_files(folder, description)
    else:
        for part in ("imagesTr", "labelsTr"):
            if not (folder / part).is_dir():
                raise DataError(f"{option} {folder}: the folder {part} is missing")
        files, defects = _found_files(folder, description)
    if len(files) < min_cases:
        few = f"{len(files)} training cases with file_ending {description['file_ending']!r}, {min_cases} are needed"
        raise DataError(f"{option} {folder}: {shortened([few, *defects])}")
    channels = len(description["channel_names"])
    usual = Counter(len(images) for images, _ in files.values()).most_common(1)[0][0]
    for case, (images, label) in files.items():
        # Fewer files than channels are legal: a colour image, or a 4D file, holds several.
        if len(images) > channels or len(images) != usual:
            defects.append(f"case {case!r} has {len(images)} image files, others have {usual}; channels: {channels}")
        defects += [f"case {case!r}: {path.name} is missing" for path in (*images, label) if not path.is_file()]
    if description["numTraining"] != len(files):
        defects.append(f"numTraining = {description['numTraining']} in dataset.json, but there are {len(files)} cases")
    images_of = {case: images for case, (images, _) in files.items()}
    label_of = {case: label for case, (_, label) in files.items()}
    return RawDataset(folder, description, images_of, label_of), defects


def shortened(defects: list[str], separator: str = "; ") -> str:
    """The first defects in one text, with the number of the others."""
    more = [f"... and {len(defects) - SHOWN} more"] if len(defects) > SHOWN else []
    return separator.join([*defects[:SHOWN], *more])


def place_raw_dataset(dataset: RawDataset, raw: Path) -> RawDataset:
    """Link the dataset into the folder ``raw``, or copy it where links are not possible; returns the placed one."""
    raw.mkdir(parents=True, exist_ok=True)
    target = raw / dataset.name
    if not target.exists():
        try:
            target.symlink_to(dataset.folder, target_is_directory=True)
        except OSError:  # Windows without the privilege, file systems without links
            shutil.copytree(dataset.folder, target)
    return read_raw_dataset(target)


_Files = dict[str, tuple[tuple[Path, ...], Path]]


def _listed_files(folder: Path, description: dict[str, Any]) -> tuple[_Files, list[str]]:
    """Images and label of each case that dataset.json lists, by nnU-Net's rules."""
    # A copy: nnU-Net's function changes the description.
    found = get_filenames_of_train_images_and_targets(str(folder), deepcopy(description))
    files = {
        str(case): (tuple(Path(image) for image in entry["images"]), Path(entry["label"]))
        for case, entry in sorted(found.items())
    }
    return files, [f"case {case!r} has no image in dataset.json" for case, (images, _) in files.items() if not images]


def _found_files(folder: Path, description: dict[str, Any]) -> tuple[_Files, list[str]]:
    """Images and label of each case in imagesTr and labelsTr, and what is wrong with their names.

    nnU-Net cuts a fixed length off a file's name, and so takes a misnamed file for a case of another name.
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
            defects.append(f"case {case!r} has the channels {numbers}; number them from 0000 without gaps")
    labels = {path.name.removesuffix(ending) for path in (folder / "labelsTr").iterdir() if path.name.endswith(ending)}
    defects += [f"labelsTr/{case}{ending} has no image in imagesTr" for case in sorted(labels - set(images))]
    files = {
        case: (tuple(path for _, path in sorted(channels.items())), folder / "labelsTr" / f"{case}{ending}")
        for case, channels in sorted(images.items())
    }
    return files, defects


_Label = NonNegativeInt | Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # nnU-Net takes "1" too


class _ListedCase(BaseModel):
    images: list[str]
    label: str


class _Description(BaseModel):
    """What nnU-Net reads from dataset.json."""

    model_config = ConfigDict(strict=True)

    channel_names: dict[str, str]
    labels: dict[str, _Label | Annotated[list[_Label], Field(min_length=1)]]
    regions_class_order: list[int] | None = Field(None, validate_default=True)
    numTraining: NonNegativeInt
    file_ending: str
    dataset: dict[str, _ListedCase] = {}

    @field_validator("channel_names")
    @classmethod
    def _numbered(cls, channels: dict[str, str]) -> dict[str, str]:
        if not channels or set(channels) != {str(index) for index in range(len(channels))}:
            raise ValueError('it must be {"0": NAME, "1": NAME, ...}')
        return channels

    @field_validator("labels")
    @classmethod
    def _consecutive(cls, labels: dict[str, Any]) -> dict[str, Any]:
        values = {name: _numbers(value) for name, value in labels.items() if name != "ignore"}
        times = Counter(number for numbers in values.values() for number in numbers)
        if values.get("background") != [0] or len(times) < 2 or sorted(times) != list(range(len(times))):
            raise ValueError('it must have "background": 0, then a class for each of 1, 2, ... without gaps')
        if "ignore" in labels and labels["ignore"] != len(times):
            raise ValueError(f"ignore must be the highest label, {len(times)}")
        if all(len(numbers) == 1 for numbers in values.values()) and max(times.values()) > 1:
            raise ValueError("it must have one name for each value")
        return labels

    @field_validator("regions_class_order")
    @classmethod
    def _of_regions(cls, order: list[int] | None, info: ValidationInfo) -> list[int] | None:
        values = [_numbers(value) for name, value in info.data.get("labels", {}).items() if name != "ignore"]
        regions = sum(set(numbers) != {0} for numbers in values)
        if any(len(numbers) > 1 for numbers in values) and len(order or ()) != regions:
            raise ValueError(f"it must list {regions} labels, one for each region")
        return order

    @field_validator("file_ending")
    @classmethod
    def _known(cls, ending: str) -> str:
        known = sorted({name for reader in LIST_OF_IO_CLASSES for name in reader.supported_file_endings})
        if ending.lower() not in known:
            raise ValueError(f"it must be one of {', '.join(known)}")
        return ending


def description_defects(description: Any) -> list[str]:
    """One defect for each key of a dataset.json that breaks nnU-Net's rules."""
    found: dict[str, str] = {}
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            key = str(one["loc"][0]) if one["loc"] else "content"
            value = description.get(key) if isinstance(description, dict) else description
            found.setdefault(key, f"{key}: {one['msg'].removeprefix('Value error, ')}, found {repr(value)[:120]}")
    return list(found.values())


def _numbers(label: Any) -> list[int]:
    return [int(number) for number in (label if isinstance(label, list) else [label])]
