"""AMOS22: abdominal CT, or CT and MR. Training and validation cases become training cases, as in nnunetv2's converter.

The release after the challenge (https://zenodo.org/records/7262581) holds imagesTr, labelsTr, imagesVa, labelsVa,
imagesTs and dataset.json. Numbers up to 500 are CT, above 500 MR.
"""

from __future__ import annotations

from pathlib import Path

from masksam_nnunet.errors import DataError

from .conversion import ENDING, Download, DownloadedCase, listed_cases, locate, read_description

MODALITIES = {"ct": ("task1", "CT"), "all": ("task2", "either_CT_or_MR")}
"""The end of the dataset's name, and the channel's name."""
_LAST_CT = 500
_FOLDERS = {"training": ("imagesTr", "labelsTr"), "validation": ("imagesVa", "labelsVa"), "test": ("imagesTs", None)}
_REMEDY = (
    "download and unpack https://zenodo.org/records/7262581 (the release after the challenge, with labelsVa) again, "
    "and give the folder that holds its dataset.json"
)


def read_amos(source: Path, *, modality: str = "ct") -> Download:
    """The cases that dataset.json lists.

    Args:
        source: the folder that holds dataset.json, or the one above it.
        modality: ``ct``, as in the papers' "AMOS (CT)", or ``all``. With ``ct``, MR files need not be there.
    """
    if modality not in MODALITIES:
        raise DataError(f"--modality {modality}: choose {' or '.join(MODALITIES)}")
    root = locate(source, ("amos22",), "dataset.json", _REMEDY)
    path = root / "dataset.json"
    description, labels = read_description(path, ("labels", *_FOLDERS))
    cases = []
    for part, (images, label_maps) in _FOLDERS.items():
        for name in listed_cases(description[part], part, path, _REMEDY):
            number = name.split("_")[-1]
            if not number.isdigit():
                raise DataError(f"{path}: {name!r} of {part!r} is not named amos_XXXX; {_REMEDY}")
            if modality == "all" or int(number) <= _LAST_CT:
                label = root / label_maps / f"{name}{ENDING}" if label_maps else None
                cases.append(DownloadedCase(name, root / images / f"{name}{ENDING}", label, part == "test"))
    task, channel = MODALITIES[modality]
    return Download(
        root,
        _REMEDY,
        name=f"AMOS2022_postChallenge_{task}",
        cases=cases,
        channels=[channel],
        labels=labels,
        about={
            "name": f"AMOS2022_postChallenge_{task}",
            "reference": "https://amos22.grand-challenge.org/",
            "release": "https://zenodo.org/record/7262581",
            "licence": "CC BY 4.0",
            "converted_by": f"masksam convert amos --modality {modality}",
            "overwrite_image_reader_writer": "NibabelIOWithReorient",  # as in nnunetv2's converter
        },
    )
