"""From each challenge's official download to nnU-Net's raw format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import DataError

from .acdc import read_acdc
from .amos import read_amos
from .conversion import Conversion, free_place, place
from .msd import read_msd
from .synapse import read_synapse

READERS: dict[str, Callable[..., Conversion]] = {
    "acdc": read_acdc,
    "synapse": read_synapse,
    "amos": read_amos,
    "msd": read_msd,
}
"""For each challenge, the function that checks its download."""


def convert(kind: str, source: Path, dataset_id: int, *, raw: Path | None = None, **options: Any) -> Path:
    """Convert a download to ``DatasetXXX_Name``, completely or not at all.

    Args:
        kind: a key of ``READERS``.
        source: the download's folder.
        dataset_id: 1 to 999; no dataset of nnU-Net may have it.
        raw: the folder for the dataset, by default $nnUNet_raw.
        options: those of the challenge's function in ``READERS``.

    Returns:
        The dataset's folder.

    Raises:
        DataError: the download is incomplete or damaged, the number is taken, or the folder cannot be written.
    """
    raw = free_place(dataset_id, raw)
    try:
        conversion = READERS[kind](source, **options)
    except OSError as error:
        raise DataError(f"SOURCE {source} cannot be read: {error}") from error
    return place(conversion, dataset_id, raw)
