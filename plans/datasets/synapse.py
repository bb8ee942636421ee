"""Synapse (BTCV, abdomen): 30 labelled CT, 13 organs or the 8 of TransUNet, and TransUNet's 18/12 split.

The official RawData holds Training/img/img0001.nii.gz, Training/label/label0001.nii.gz and 20 images without labels in
Test/img or Testing/img.
"""

from __future__ import annotations

import re
from pathlib import Path

from masksam_nnunet.errors import DataError

from .conversion import ENDING, Download, DownloadedCase, locate, nifti_names

ORGANS_13 = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
"""BTCV's organs; the first is label 1."""
ORGANS_8 = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""TransUNet's organs. Sources disagree on its numbers: only the names count, ours are 1 to 8 in this order."""
ORGANS = {13: ORGANS_13, 8: ORGANS_8}
TRAIN_18 = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_12 = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
SPLITS = {"18/12": TEST_12, "none": ()}
"""The labelled cases that become test cases."""
_UNLABELLED = range(61, 81)
_REMEDY = (
    "download RawData of syn3193805 (Abdomen) again from https://www.synapse.org and give the folder RawData; "
    "--partial accepts a download with fewer cases"
)


def read_synapse(source: Path, *, organs: int = 13, split: str = "18/12", partial: bool = False) -> Download:
    """Cases with the names of their images, ``img0001``.

    Args:
        source: RawData, or the folder that holds it.
        organs: 13, or 8 with the other organs as background.
        split: ``18/12`` puts TransUNet's 18 training cases in imagesTr and its 12 test cases in imagesTs and labelsTs,
            for scoring; ``none`` puts all 30 in imagesTr, and the 20 images without labels, where there, in imagesTs.
        partial: accept fewer cases than the official ones.
    """
    for option, value, choices in (("organs", organs, ORGANS), ("split", split, SPLITS)):
        if value not in choices:
            raise DataError(f"--{option} {value}: there are {', '.join(map(str, choices))}")
    root = locate(source, ("RawData", "Abdomen/RawData"), "Training", _REMEDY)
    img, label = root / "Training" / "img", root / "Training" / "label"
    present, official = _numbers(img), {*TRAIN_18, *TEST_12}
    cases = [
        DownloadedCase(_name(number), img / f"{_name(number)}{ENDING}", label / f"label{number:04d}{ENDING}", test)
        for number in sorted(official & present if partial else official)
        for test in [number in SPLITS[split]]
    ]
    if split == "none":
        cases += _unlabelled(root, partial)
    names = ORGANS[organs]
    how = "18 training and 12 test cases as in TransUNet (https://arxiv.org/abs/2102.04306)"
    return Download(
        root,
        _REMEDY,
        name=f"Synapse{organs}",
        cases=cases,
        channels=["CT"],
        labels={"background": 0} | {organ: value for value, organ in enumerate(names, start=1)},
        new_values=[0, *(names.index(organ) + 1 if organ in names else 0 for organ in ORGANS_13)],
        about={
            "name": f"Synapse multi-organ (BTCV abdomen), {organs} organs",
            "reference": "https://www.synapse.org/#!Synapse:syn3193805, doi 10.7303/syn3193805",
            "licence": "terms of use at https://www.synapse.org/#!Synapse:syn3193805",
            "converted_by": f"masksam convert synapse --organs {organs} --split {split}",
            "description": how if split == "18/12" else "all labelled cases for training",
        },
        defects=[f"Training/img/{_name(number)}{ENDING} is no case of the challenge" for number in present - official],
    )


def _name(number: int) -> str:
    return f"img{number:04d}"


def _numbers(folder: Path) -> set[int]:
    return {int(found[1]) for name in nifti_names(folder) if (found := re.fullmatch(r"img(\d+)\.nii\.gz", name))}


def _unlabelled(root: Path, partial: bool) -> list[DownloadedCase]:
    """The 20 test images without labels, none where the download has none."""
    for folder in (root / "Test" / "img", root / "Testing" / "img"):
        present = _numbers(folder) & set(_UNLABELLED)
        if present:
            numbers = sorted(present) if partial else _UNLABELLED
            return [DownloadedCase(_name(number), folder / f"{_name(number)}{ENDING}", test=True) for number in numbers]
    return []
