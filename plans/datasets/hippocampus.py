"""MSD Task04 Hippocampus: small, real and openly licensed, for a first run."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from pathlib import Path

from masksam_nnunet.download import fetch_verified
from masksam_nnunet.errors import DataError

from .convert import convert, free_place

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
MD5 = "9d24dba78a72977dbd1d2e110310f31b"
"""As MONAI states it for its DecathlonDataset."""
_TASK = "Task04_Hippocampus"


def get_hippocampus(
    *,
    dataset_id: int = 4,
    out: Path | None = None,
    url: str | None = None,
    source: Path | None = None,
    md5: str = MD5,
    progress: bool = True,
) -> Path:
    """Fetch Task04_Hippocampus.tar into the cache, verify, unpack and convert it.

    Args:
        dataset_id: the number of the new dataset.
        out: the folder for it, by default $nnUNet_raw.
        url: a mirror: the file's address or, ending in "/", its folder's.
        source: the tar file, if it is here already.
        md5: the expected hash, in hex.
        progress: show a progress bar on stderr.

    Returns:
        The dataset's folder, such as ``Dataset004_Hippocampus``.

    Raises:
        DataError: no connection, a damaged file, the cache cannot be written, the number is taken, nnUNet_raw is not
            set, or the file does not hold the task.
    """
    raw = free_place(dataset_id, out)  # before the download

    def check(path: Path, origin: str) -> None:
        with path.open("rb") as file:
            received = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if received != md5:
            raise DataError(
                f"wrong MD5 for {origin}: expected {md5}, received {received}: the file is damaged or another one; "
                f"fetch {_TASK}.tar again, or name a mirror with --url"
            )

    tar = fetch_verified(f"{_TASK}.tar", url or URL, check, DataError, source=source, progress=progress)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{_TASK}.", dir=raw) as folder:
            unpack(tar, Path(folder))
            return convert("msd", Path(folder) / _TASK, dataset_id, raw=raw)
    except OSError as error:
        raise DataError(f"cannot unpack {tar} into {raw}: {error}") from error


def unpack(tar: Path, folder: Path) -> None:
    """Unpack files and folders of ``tar`` into ``folder``, and nothing outside it.

    Raises:
        DataError: it is no tar file, breaks off, or holds links, devices or paths that lead elsewhere.
    """
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{tar} holds {member.name!r}, which is neither a file nor a folder; not unpacked")
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:  # EOFError: compressed and broken off
        raise DataError(f"{tar} cannot be unpacked: {error}; fetch it again") from error
