"""AMOS22: abdominal CT, or CT and MR, by nnunetv2's converters 218 and 219.

The release after the challenge (https://zenodo.org/records/7262581) holds imagesTr, labelsTr, imagesVa, labelsVa,
imagesTs and dataset.json. Numbers up to 500 are CT, above 500 MR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2.dataset_conversion import Dataset218_Amos2022_task1, Dataset219_Amos2022_task2

from masksam_nnunet.errors import DataError

from .checks import ENDING, Volume, described_labels, locate, read_description, require_sound
from .conversion import Conversion, nnunet_raw_at

MODALITIES = ("ct", "all")
_LAST_CT = 500
_FOLDERS = {"training": ("imagesTr", "labelsTr"), "validation": ("imagesVa", "labelsVa"), "test": ("imagesTs", None)}
_REMEDY = (
    "download and unpack https://zenodo.org/records/7262581 (the release after the challenge, with labelsVa) again, "
    "and give the folder that holds its dataset.json"
)


def read_amos(source: Path, *, modality: str = "ct") -> Conversion:
    """Check a download; to be written are imagesTr and labelsTr (training and validation) and imagesTs.

    Args:
        source: the folder that holds dataset.json, or the one above it.
        modality: ``ct``, as in the papers' "AMOS (CT)", or ``all``. With ``ct``, MR files need not be there.

    Raises:
        DataError: files that dataset.json lists are missing or damaged, or nnunetv2's converter would leave some out.
    """
    if modality not in MODALITIES:
        raise DataError(f"--modality {modality}: there are {', '.join(MODALITIES)}")
    root = locate(source, ("amos22",), "dataset.json", _REMEDY)
    path = root / "dataset.json"
    description = read_description(path, ("labels", *_FOLDERS))
    labels = described_labels(description, path)
    cases: dict[str, list[str]] = {}
    volumes: list[Volume] = []
    for part, (images, targets) in _FOLDERS.items():
        cases[part] = [
            case for case in _listed(description[part], part, path) if modality == "all" or _number(case) <= _LAST_CT
        ]
        for case in cases[part]:
            label = root / targets / f"{case}{ENDING}" if targets else None
            volumes.append(Volume(root / images / f"{case}{ENDING}", label))
    require_sound(root, volumes, labels, _REMEDY)
    if not cases["training"]:
        raise DataError(f"{path} lists no training image for --modality {modality}; {_REMEDY}")

    def write(raw: Path, dataset_id: int) -> None:
        if modality == "ct":
            with nnunet_raw_at(Dataset218_Amos2022_task1, raw):
                Dataset218_Amos2022_task1.convert_amos_task1(str(root), dataset_id)
        else:
            with nnunet_raw_at(Dataset219_Amos2022_task2, raw):
                Dataset219_Amos2022_task2.convert_amos_task2(str(root), dataset_id)

    return Conversion(
        name=f"AMOS2022_postChallenge_task{1 if modality == 'ct' else 2}",
        training=(*cases["training"], *cases["validation"]),
        test=tuple(cases["test"]),
        about={
            "licence": "CC BY 4.0",
            "converted_by": f"masksam convert amos --modality {modality}, with nnunetv2's converter",
        },
        write=write,
    )


def _listed(entries: Any, part: str, path: Path) -> list[str]:
    """Cases in one list of dataset.json, whose entries are ``{"image": "./imagesTr/amos_0001.nii.gz", ...}``."""
    cases = []
    for entry in entries:
        image = entry.get("image") if isinstance(entry, dict) else None
        case = str(image).split("/")[-1].removesuffix(ENDING)
        if not str(image).endswith(ENDING) or not case.split("_")[-1].isdigit():
            raise DataError(f"{path}: an entry of {part!r} names no image amos_XXXX{ENDING}: {entry!r}; {_REMEDY}")
        cases.append(case)
    return cases


def _number(case: str) -> int:
    return int(case.split("_")[-1])
