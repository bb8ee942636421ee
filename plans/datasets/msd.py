"""The tasks of the Medical Segmentation Decathlon, by nnunetv2's converter.

A task's download is a folder ``TaskXX_Name`` with imagesTr, labelsTr, imagesTs and dataset.json; an image of several
channels is one 4D file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from nnunetv2.dataset_conversion import convert_MSD_dataset

from masksam_nnunet.errors import DataError

from .checks import ENDING, Volume, described_labels, locate, nifti_names, read_description, require_sound
from .conversion import Conversion, nnunet_raw_at

_REMEDY = "download the task again from http://medicaldecathlon.com and give its folder TaskXX_Name"
_NAME = re.compile(r"Task\d{2}_([^_]+)")


def read_msd(source: Path, *, processes: int = 2) -> Conversion:
    """Check a download; to be written are imagesTr with a file for each channel, labelsTr and imagesTs.

    All images in the folders are taken, as nnunetv2 takes them; those that dataset.json lists must be there.

    Args:
        source: the folder ``TaskXX_Name``.
        processes: worker processes that split images into channels.

    Raises:
        DataError: the folder's name, dataset.json or some of the files are not those of a task.
    """
    source = Path(os.path.abspath(source))
    named = _NAME.fullmatch(source.name)  # the converter takes the name apart
    if named is None:
        raise DataError(f"SOURCE {source}: the folder's name must be TaskXX_Name, not {source.name!r}; {_REMEDY}")
    root = locate(source, (), "dataset.json", _REMEDY)
    path = root / "dataset.json"
    description = read_description(path, ("labels", "modality", "training", "test"))
    labels = described_labels(description, path)
    defects = [f"the folder {part} is missing" for part in ("imagesTr", "labelsTr", "imagesTs") if not _has(root, part)]
    training = _cases(root, ("imagesTr", "labelsTr"), _listed(description["training"], path))
    test = _cases(root, ("imagesTs",), _listed(description["test"], path))
    channels = len(description["modality"])
    volumes = [
        Volume(root / "imagesTr" / f"{case}{ENDING}", root / "labelsTr" / f"{case}{ENDING}", channels)
        for case in training
    ]
    volumes += [Volume(root / "imagesTs" / f"{case}{ENDING}", channels=channels) for case in test]
    require_sound(root, volumes, labels, _REMEDY, defects)
    if not training:
        raise DataError(f"{path} lists no training image; {_REMEDY}")

    def write(raw: Path, dataset_id: int) -> None:
        with nnunet_raw_at(convert_MSD_dataset, raw):
            convert_MSD_dataset.convert_msd_dataset(str(root), dataset_id, processes)

    return Conversion(
        name=named[1],
        training=tuple(training),
        test=tuple(test),
        channels=channels,
        about={"converted_by": "masksam convert msd, with nnunetv2's convert_MSD_dataset"},
        write=write,
    )


def _has(root: Path, part: str) -> bool:
    return (root / part).is_dir()


def _listed(entries: Any, path: Path) -> set[str]:
    """Cases in a list of dataset.json: ``{"image": "./imagesTr/la_003.nii.gz", ...}`` or ``"./imagesTs/la_001..."``."""
    cases = set()
    for entry in entries:
        image = str(entry.get("image") if isinstance(entry, dict) else entry).split("/")[-1]
        if not image.endswith(ENDING):
            raise DataError(f"{path} lists {entry!r}, which names no image *{ENDING}; {_REMEDY}")
        cases.add(image.removesuffix(ENDING))
    return cases


def _cases(root: Path, parts: tuple[str, ...], listed: set[str]) -> list[str]:
    """Listed cases and those with a file in one of the folders ``parts``."""
    present = {name.removesuffix(ENDING) for part in parts for name in nifti_names(root / part)}
    return sorted(listed | present)
