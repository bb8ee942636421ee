"""AMOS22: abdominal CT, or CT and MR, by nnunetv2's converters 218 and 219.

The release after the challenge (https://zenodo.org/records/7262581) holds imagesTr, labelsTr, imagesVa, labelsVa,
imagesTs and dataset.json. Numbers up to 500 are CT, above 500 MR.
"""

from __future__ import annotations

from pathlib import Path

from nnunetv2.dataset_conversion import Dataset218_Amos2022_task1, Dataset219_Amos2022_task2

from masksam_nnunet.environment import variable
from masksam_nnunet.errors import DataError

from .conversion import (
    ENDING,
    Conversion,
    DownloadedImage,
    listed_cases,
    locate,
    read_description,
    require_sound,
)

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
        raise DataError(f"--modality {modality}: choose {' or '.join(MODALITIES)}")
    root = locate(source, ("amos22",), "dataset.json", _REMEDY)
    path = root / "dataset.json"
    description, labels = read_description(path, ("labels", *_FOLDERS))
    cases: dict[str, list[str]] = {}
    images: list[DownloadedImage] = []
    for part, (image_folder, label_folder) in _FOLDERS.items():
        # The converter reads objects only, not plain names.
        entries = [entry if isinstance(entry, dict) else {} for entry in description[part]]
        listed = listed_cases(entries, part, path, _REMEDY)
        unnumbered = [case for case in listed if not case.split("_")[-1].isdigit()]
        if unnumbered:
            raise DataError(f"{path}: {unnumbered[0]!r} of {part!r} is not named amos_XXXX; {_REMEDY}")
        cases[part] = [case for case in listed if modality == "all" or int(case.split("_")[-1]) <= _LAST_CT]
        for case in cases[part]:
            label = root / label_folder / f"{case}{ENDING}" if label_folder else None
            images.append(DownloadedImage(root / image_folder / f"{case}{ENDING}", label))
    require_sound(root, images, labels, _REMEDY)
    if not cases["training"]:
        raise DataError(f"{path} lists no training image for --modality {modality}; {_REMEDY}")

    def write(raw: Path, dataset_id: int) -> None:
        with variable("nnUNet_raw", str(raw)):  # the converter reads it
            if modality == "ct":
                Dataset218_Amos2022_task1.convert_amos_task1(str(root), dataset_id)
            else:
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
