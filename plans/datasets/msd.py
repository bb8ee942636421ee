"""The tasks of the Medical Segmentation Decathlon, by nnunetv2's converter; Task04 Hippocampus is also downloaded.

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

from nnunetv2.dataset_conversion import convert_MSD_dataset

from masksam_nnunet.download import fetch_verified
from masksam_nnunet.environment import variable
from masksam_nnunet.errors import DataError

from .conversion import (
    ENDING,
    Conversion,
    DownloadedImage,
    free_place,
    listed_cases,
    locate,
    nifti_names,
    place,
    read_description,
    require_sound,
)

_REMEDY = "download the task again from http://medicaldecathlon.com and give its folder TaskXX_Name"
HIPPOCAMPUS_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
HIPPOCAMPUS_MD5 = "9d24dba78a72977dbd1d2e110310f31b"
"""As MONAI states it for its DecathlonDataset."""
_HIPPOCAMPUS = "Task04_Hippocampus"
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
        raise DataError(f"SOURCE {source}: the folder's name must be TaskXX_Name; {_REMEDY}")
    root = locate(source, (), "dataset.json", _REMEDY)
    path = root / "dataset.json"
    description, labels = read_description(path, ("labels", "modality", "training", "test"))
    parts = ("imagesTr", "labelsTr", "imagesTs")
    defects = [f"the folder {part} is missing" for part in parts if not (root / part).is_dir()]

    def cases(part: str, folders: tuple[str, ...]) -> tuple[str, ...]:
        present = {name.removesuffix(ENDING) for folder in folders for name in nifti_names(root / folder)}
        return tuple(sorted(present | set(listed_cases(description[part], part, path, _REMEDY))))

    training, test = cases("training", ("imagesTr", "labelsTr")), cases("test", ("imagesTs",))
    channels = len(description["modality"])
    images = [
        DownloadedImage(root / "imagesTr" / f"{case}{ENDING}", root / "labelsTr" / f"{case}{ENDING}", channels)
        for case in training
    ]
    images += [DownloadedImage(root / "imagesTs" / f"{case}{ENDING}", channels=channels) for case in test]
    require_sound(root, images, labels, _REMEDY, defects)
    if not training:
        raise DataError(f"{path} lists no training image; {_REMEDY}")

    def write(raw: Path, dataset_id: int) -> None:
        with variable("nnUNet_raw", str(raw)):  # the converter reads it
            convert_MSD_dataset.convert_msd_dataset(str(root), dataset_id, processes)

    return Conversion(
        name=named[1],
        training=training,
        test=test,
        channels=channels,
        about={"converted_by": "masksam convert msd, with nnunetv2's convert_MSD_dataset"},
        write=write,
    )


def get_hippocampus(
    *,
    dataset_id: int = 4,
    out: Path | None = None,
    url: str | None = None,
    source: Path | None = None,
    md5: str = HIPPOCAMPUS_MD5,
    progress: bool = True,
) -> Path:
    """Fetch Task04_Hippocampus.tar into the cache, verify, unpack and convert it.

    Args:
        dataset_id: the number of the new dataset.
        out: the folder for it, by default $nnUNet_raw.
        url: a mirror: the file's address or, ending in "/", its folder's.
        source: the tar file, if it is already here.
        md5: the expected hash, in hex.
        progress: show a progress bar.

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

    tar = fetch_verified(
        f"{_HIPPOCAMPUS}.tar", url or HIPPOCAMPUS_URL, check, DataError, source=source, progress=progress
    )
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{_HIPPOCAMPUS}.", dir=raw) as folder:
            unpack(tar, Path(folder))
            return place(read_msd(Path(folder) / _HIPPOCAMPUS), dataset_id, raw)
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
