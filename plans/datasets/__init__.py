"""From each challenge's official download to nnU-Net's raw format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import DataError

from .acdc import read_acdc
from .amos import read_amos
from .conversion import Download, create_dataset, free_place
from .msd import read_msd
from .synapse import read_synapse

READERS: dict[str, Callable[..., Download]] = {
    "acdc": read_acdc,
    "synapse": read_synapse,
    "amos": read_amos,
    "msd": read_msd,
}
"""For each challenge, the function that describes its download, or raises a DataError where it is none."""


def convert(kind: str, source: Path, dataset_id: int, **options: Any) -> Path:
    """Convert a download to ``DatasetXXX_Name`` in $nnUNet_raw, completely or not at all; its folder.

    ``kind`` is a key of :data:`READERS`, and ``options`` are those of its function.

    Raises:
        DataError: the download is incomplete or damaged, the number is taken, or the folder cannot be written.
    """
    raw = free_place(dataset_id)
    try:
        download = READERS[kind](source, **options)
    except OSError as error:
        raise DataError(f"SOURCE {source} cannot be read: {error}") from error
    return create_dataset(download, dataset_id, raw)
