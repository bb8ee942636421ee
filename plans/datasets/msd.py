"""The tasks of the Medical Segmentation Decathlon, one file for each channel; Task04 Hippocampus is also downloaded.

A task's download is a folder ``TaskXX_Name`` with imagesTr, labelsTr, imagesTs and dataset.json; an image of several
channels is one 4D file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from pathlib import Path

from masksam_nnunet.download import fetch_verified
from masksam_nnunet.errors import DataError

from .conversion import (
    ENDING,
    Download,
    DownloadedCase,
    create_dataset,
    free_place,
    listed_cases,
    locate,
    nifti_names,
    read_description,
)

_REMEDY = "download the task again from http://medicaldecathlon.com and give its folder TaskXX_Name"
HIPPOCAMPUS_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
HIPPOCAMPUS_MD5 = "9d24dba78a72977dbd1d2e110310f31b"
"""As MONAI states it for its DecathlonDataset."""
_HIPPOCAMPUS = "Task04_Hippocampus"
_FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
_NAME = re.compile(r"Task\d{2}_([^_]+)")


def read_msd(source: Path, *, processes: int = 2) -> Download:
    """All images in the folders, as nnunetv2's converter takes them; those that dataset.json lists must be there.

    Args:
        source: the folder ``TaskXX_Name``.
        processes: worker processes that split images into channels.
    """
    root = Path(os.path.abspath(source))
    named = _NAME.fullmatch(root.name)
    if named is None:
        raise DataError(f"SOURCE {root}: the folder's name must be TaskXX_Name; {_REMEDY}")
    path = locate(root, (), "dataset.json", _REMEDY) / "dataset.json"
    description, labels = read_description(path, ("labels", "modality", "training", "test"))
    cases = []
    for part, folders in (("training", ("imagesTr", "labelsTr")), ("test", ("imagesTs",))):
        present = {name.removesuffix(ENDING) for folder in folders for name in nifti_names(root / folder)}
        for name in sorted(present | set(listed_cases(description[part], part, path, _REMEDY))):
            label = root / "labelsTr" / f"{name}{ENDING}" if part == "training" else None
            cases.append(DownloadedCase(name, root / folders[0] / f"{name}{ENDING}", label, part == "test"))
    modality = description["modality"]
    return Download(
        root,
        _REMEDY,
        name=named[1],
        cases=cases,
        channels=[modality[key] for key in sorted(modality)] if isinstance(modality, dict) else modality,
        labels=labels,
        about={key: value for key, value in description.items() if key not in ("modality", "training", "test")}
        | {"converted_by": "masksam convert msd"},
        defects=[f"the folder {part} is missing" for part in _FOLDERS if not (root / part).is_dir()],
        processes=processes,
    )


def get_hippocampus(
    *,
    dataset_id: int = 4,
    out: Path | None = None,
    url: str | None = None,
    source: Path | None = None,
    md5: str = HIPPOCAMPUS_MD5,
) -> Path:
    """Fetch Task04_Hippocampus.tar into the cache, verify, unpack and convert it.

    Args:
        dataset_id: the number of the new dataset.
        out: the folder for it, by default $nnUNet_raw.
        url: a mirror: the file's address or, ending in "/", its folder's.
        source: the tar file, if it is already here.
        md5: the expected hash, in hex.

    Returns:
        The dataset's folder, such as ``Dataset004_Hippocampus``.

    Raises:
        DataError: no connection, a damaged file, the number is taken, or a folder cannot be written.
    """
    raw = free_place(dataset_id, out)  # before the download

    def check(path: Path, origin: str) -> None:
        with path.open("rb") as file:
            received = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if received != md5:
            raise DataError(
                f"wrong MD5 for {origin}: expected {md5}, received {received}; fetch it again, or use --url"
            )

    tar = fetch_verified(f"{_HIPPOCAMPUS}.tar", url or HIPPOCAMPUS_URL, check, DataError, source=source)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{_HIPPOCAMPUS}.", dir=raw) as folder:
            unpack(tar, Path(folder))
            return create_dataset(read_msd(Path(folder) / _HIPPOCAMPUS), dataset_id, raw)
    except OSError as error:
        raise DataError(f"cannot unpack {tar} into {raw}: {error}") from error


def unpack(tar: Path, folder: Path) -> None:
    """Unpack files and folders of ``tar`` into ``folder``, and nothing outside it.

    Raises:
        DataError: it is not a tar file, is truncated, or holds links, devices or paths that lead elsewhere.
    """
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{tar} holds {member.name!r}, which is neither a file nor a folder; not unpacked")
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:  # EOFError: compressed and truncated
        raise DataError(f"{tar} cannot be unpacked: {error}; fetch it again") from error
