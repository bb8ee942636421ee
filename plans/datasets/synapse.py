"""Synapse (BTCV, abdomen): 30 labelled CT, 13 organs or the 8 of TransUNet, and TransUNet's 18/12 split.

The official RawData holds Training/img/img0001.nii.gz, Training/label/label0001.nii.gz and 20 images without labels in
Test/img or Testing/img. nnunetv2 has no converter for it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from masksam_nnunet.errors import DataError

from ..images import open_nifti
from .conversion import ENDING, Conversion, DownloadedImage, locate, nifti_names, require_sound

ORGANS_13 = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""BTCV's organs; the first is label 1."""
ORGANS_8 = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""TransUNet's organs. Sources disagree on its numbers: only the names count, ours are 1 to 8 in this order."""
ORGANS = {13: ORGANS_13, 8: ORGANS_8}
TRAIN_18 = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_12 = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
SPLITS = ("18/12", "none")
_UNLABELLED = range(61, 81)
_REMEDY = (
    "download RawData of syn3193805 (Abdomen) again from https://www.synapse.org and give the folder RawData; "
    "--partial accepts a download with fewer cases"
)


def read_synapse(source: Path, *, organs: int = 13, split: str = "18/12", partial: bool = False) -> Conversion:
    """Check a download. Cases keep their images' names, ``img0001``.

    Args:
        source: RawData, or the folder that holds it.
        organs: 13, or 8 with the other organs as background.
        split: ``18/12`` puts TransUNet's 18 training cases in imagesTr and its 12 test cases in imagesTs and labelsTs,
            for scoring; ``none`` puts all 30 in imagesTr, and the 20 images without labels, where there, in imagesTs.
        partial: accept fewer cases than the official ones.

    Raises:
        DataError: files are missing or damaged.
    """
    if organs not in ORGANS:
        raise DataError(f"--organs {organs}: there are {', '.join(map(str, ORGANS))}")
    if split not in SPLITS:
        raise DataError(f"--split {split}: there are {', '.join(SPLITS)}")
    root = locate(source, ("RawData", "Abdomen/RawData"), "Training", _REMEDY)
    training_folder = root / "Training"
    present = _numbers(training_folder / "img")
    official = {*TRAIN_18, *TEST_12}
    unknown = sorted(present - official)
    defects = [f"Training/img/{_case(number)}{ENDING} is no case of the challenge" for number in unknown]
    numbers = official & present if partial else official
    img, label = training_folder / "img", training_folder / "label"
    labelled = {
        number: DownloadedImage(img / f"{_case(number)}{ENDING}", label / f"label{number:04d}{ENDING}")
        for number in sorted(numbers)
    }
    volumes = list(labelled.values())
    unlabelled: dict[int, DownloadedImage] = {}
    if split == "none":
        unlabelled = _unlabelled(root, partial)
        volumes += unlabelled.values()
    require_sound(root, volumes, range(len(ORGANS_13) + 1), _REMEDY, defects)

    held_out = [number for number in labelled if split == "18/12" and number in TEST_12]
    training = {_case(number): volume for number, volume in labelled.items() if number not in held_out}
    if not training:
        raise DataError(f"SOURCE {root} holds no training case for --split {split}; {_REMEDY}")
    test = {_case(number): (labelled | unlabelled)[number] for number in (*held_out, *unlabelled)}
    name = f"Synapse{organs}"

    def write(raw: Path, dataset_id: int) -> None:
        folder = raw / f"Dataset{dataset_id:03d}_{name}"
        for part, cases in (("Tr", training), ("Ts", test)):
            for case, volume in cases.items():
                _copy(volume, folder, part, case, organs)
        labels = {"background": 0} | {organ: value for value, organ in enumerate(ORGANS[organs], start=1)}
        generate_dataset_json(str(folder), {0: "CT"}, labels, len(training), ENDING)

    return Conversion(
        name=name,
        training=tuple(training),
        test=tuple(test),
        labelled_test=bool(held_out),
        about={
            "name": f"Synapse multi-organ (BTCV abdomen), {organs} organs",
            "reference": "https://www.synapse.org/#!Synapse:syn3193805, doi 10.7303/syn3193805",
            "licence": "terms of use at https://www.synapse.org/#!Synapse:syn3193805",
            "converted_by": f"masksam convert synapse --organs {organs} --split {split}",
            "description": "18 training and 12 test cases as in TransUNet (https://arxiv.org/abs/2102.04306)"
            if split == "18/12"
            else "all labelled cases for training",
        },
        write=write,
    )


def remap_organs(label: np.ndarray, organs: Sequence[str]) -> np.ndarray:
    """BTCV's 13 values as the values 1, 2, ... of ``organs``, matched by name; other organs become background.

    Args:
        label: whole numbers from 0 to 13, any shape.
        organs: names from ``ORGANS_13``.

    Returns:
        uint8, the same shape.
    """
    table = np.zeros(len(ORGANS_13) + 1, np.uint8)
    for value, organ in enumerate(organs, start=1):
        table[ORGANS_13.index(organ) + 1] = value
    remapped: np.ndarray = table[label.astype(np.intp)]
    return remapped


def _case(number: int) -> str:
    return f"img{number:04d}"


def _numbers(folder: Path) -> set[int]:
    return {int(found[1]) for name in nifti_names(folder) if (found := re.fullmatch(r"img(\d+)\.nii\.gz", name))}


def _unlabelled(root: Path, partial: bool) -> dict[int, DownloadedImage]:
    """The 20 test images without labels, none where the download has none."""
    for folder in (root / "Test" / "img", root / "Testing" / "img"):
        present = _numbers(folder) & set(_UNLABELLED)
        if present:
            numbers = sorted(present) if partial else _UNLABELLED
            return {number: DownloadedImage(folder / f"{_case(number)}{ENDING}") for number in numbers}
    return {}


def _copy(volume: DownloadedImage, folder: Path, part: str, case: str, organs: int) -> None:
    """Copy one image, and its label with the organs asked for, into ``imagesTr`` or ``imagesTs`` and the like."""
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(volume.image, images / f"{case}_0000{ENDING}")
    if volume.label is None:
        return
    labels.mkdir(exist_ok=True)
    target = labels / f"{case}{ENDING}"
    if organs == len(ORGANS_13):
        shutil.copy(volume.label, target)
        return
    original = open_nifti(volume.label)
    header = original.header.copy()  # with both of NIfTI's affine matrices
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    values = remap_organs(np.asanyarray(original.dataobj), ORGANS[organs])
    nibabel.save(nibabel.Nifti1Image(values, original.affine, header), target)
