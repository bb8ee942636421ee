"""Check a raw dataset before nnU-Net meets it, and put it where nnU-Net looks."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from masksam_nnunet.json_files import read_json

from .errors import PlanError
from .splits import NUM_FOLDS

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
        PlanError: naming what is missing or wrong, and what nnU-Net expects.
    """
    folder = Path(os.path.abspath(folder))  # not resolve(): a link's own name is the dataset's name
    if not folder.is_dir():
        raise PlanError(f"{option} {folder}: there is no such folder")
    if not _NAME.fullmatch(folder.name):
        raise PlanError(
            f"{option} {folder}: the folder's name must be DatasetXXX_Name with three digits, such as "
            f"Dataset004_Hippocampus, not {folder.name!r}; rename it or make a link of that name"
        )
    description = _read_description(folder, option)
    if "dataset" not in description:  # else dataset.json lists the files itself
        for part in ("imagesTr", "labelsTr"):
            if not (folder / part).is_dir():
                raise PlanError(f"{option} {folder}: the folder {part} is missing; nnU-Net's raw format needs it")
    # A copy: nnU-Net's function changes the description. It also returns numpy strings.
    found = get_filenames_of_train_images_and_targets(str(folder), json.loads(json.dumps(description)))
    files = {str(case): entry for case, entry in sorted(found.items())}
    if len(files) < min_cases:
        raise PlanError(
            f"{option} {folder}: {len(files)} training cases ending in {description['file_ending']!r}; "
            f"at least {min_cases} are needed"
        )
    channels = len(description["channel_names"])
    usual = len(next(iter(files.values()))["images"])
    for case, entry in files.items():
        # Fewer files than channels are legal: a colour image, or a 4D file, holds several.
        if len(entry["images"]) > channels or len(entry["images"]) != usual:
            raise PlanError(
                f"{option} {folder}: case {case!r} has {len(entry['images'])} image files, others have {usual}, and "
                f"channel_names in dataset.json has {channels} entries; files are named CASE_0000, CASE_0001, ..."
            )
        for path in (*entry["images"], entry["label"]):
            if not Path(path).is_file():
                raise PlanError(f"{option} {folder}: case {case!r} lacks {Path(path).name}; add it or remove the case")
    images = {case: tuple(Path(path) for path in entry["images"]) for case, entry in files.items()}
    labels = {case: Path(entry["label"]) for case, entry in files.items()}
    return RawDataset(folder, description, images, labels)


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
        raise PlanError(f"{option} {folder}: dataset.json is missing; nnU-Net's raw format needs it")
    try:
        description = read_json(path)
    except ValueError as error:
        raise PlanError(f"{option} {folder}: dataset.json is not JSON: {error}") from error
    keys = ("channel_names", "labels", "file_ending")
    missing = [key for key in keys if not isinstance(description, dict) or key not in description]
    if missing:
        raise PlanError(f"{option} {folder}: dataset.json lacks {', '.join(missing)}; nnU-Net needs {', '.join(keys)}")
    result: dict[str, Any] = description
    return result
