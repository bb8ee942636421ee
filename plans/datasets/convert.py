"""Convert a challenge's download into nnU-Net's raw format: checked first, then whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_json

from .acdc import read_acdc
from .amos import read_amos
from .checks import ENDING
from .conversion import Conversion
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
    """Convert a download to ``DatasetXXX_Name``.

    The dataset is built beside its place, under a hidden name that nnU-Net does not find, and appears there once it
    is complete.

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
    if kind not in READERS:
        raise DataError(f"there is no converter for {kind!r}; there are {', '.join(READERS)}")
    raw = free_place(dataset_id, raw)
    try:
        conversion = READERS[kind](source, **options)
    except OSError as error:
        raise DataError(f"SOURCE {source} cannot be read: {error}") from error
    return _place(conversion, dataset_id, raw)


def free_place(dataset_id: int, raw: Path | None = None) -> Path:
    """The folder that will hold a new dataset: ``raw``, by default $nnUNet_raw.

    Raises:
        DataError: there is no folder, or some folder of nnU-Net holds a dataset of this number.
    """
    if not 1 <= dataset_id <= 999:
        raise DataError(f"-d {dataset_id}: nnU-Net's dataset numbers are 1 to 999")
    if raw is None:
        if not os.environ.get("nnUNet_raw"):
            raise DataError(
                "nnUNet_raw not set: nnU-Net keeps its data in the folders that the environment variables nnUNet_raw, "
                "nnUNet_preprocessed and nnUNet_results name; export them first"
            )
        raw = Path(os.environ["nnUNet_raw"])
    raw = Path(os.path.abspath(raw))
    others = [os.environ.get(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    for folder in (raw, *(Path(other) for other in others if other)):
        # The prefix is nnU-Net's own way to find a number.
        taken = [path for path in sorted(folder.glob(f"Dataset{dataset_id:03d}*")) if path.is_dir()]
        if taken:
            raise DataError(
                f"-d {dataset_id}: there is already {taken[0]}, nothing was changed; choose another number with -d, "
                "or remove the old dataset from nnU-Net's folders"
            )
    return raw


def _place(conversion: Conversion, dataset_id: int, raw: Path) -> Path:
    """Write the dataset into a hidden folder in ``raw``, complete it, and move it to its place."""
    name = f"Dataset{dataset_id:03d}_{conversion.name}"
    staging = raw / f".{name}.partial"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        if staging.is_dir():
            raise DataError(
                f"{staging} is there: another conversion is running, or one was killed; in that case remove the folder"
            ) from error
        raise DataError(f"cannot write into {raw}: {error.strerror or error}") from error
    try:
        conversion.write(staging, dataset_id)
        _require_complete(staging / name, conversion)
        _describe(staging / name, conversion)
        os.replace(staging / name, raw / name)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot write {raw / name}: {error}; nothing of it was kept") from error
    except (AssertionError, RuntimeError, ValueError, LookupError) as error:  # nnunetv2's converters check by these
        raise DataError(f"the conversion to {name} failed: {error}; nothing of it was kept") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return raw / name


def _require_complete(folder: Path, conversion: Conversion) -> None:
    """Every case, and nothing else, must have come through: the converters leave out what they do not recognise."""
    expected = {
        "imagesTr": _files(conversion.training, conversion.channels),
        "labelsTr": _files(conversion.training),
        "imagesTs": _files(conversion.test, conversion.channels),
        "labelsTs": _files(conversion.test) if conversion.labelled_test else set(),
    }
    for part, names in expected.items():
        present = {path.name for path in (folder / part).iterdir()} if (folder / part).is_dir() else set()
        if present == names:
            continue
        lost, extra = sorted(names - present), sorted(present - names)
        raise DataError(
            f"{folder.name}/{part} does not hold what the download holds: {len(lost)} files are missing "
            f"({', '.join(lost[:3])}), {len(extra)} are unexpected ({', '.join(extra[:3])}); nothing of it was kept. "
            "The converter treats these names in another way: is this the official download?"
        )


def _files(cases: tuple[str, ...], channels: int | None = None) -> set[str]:
    """File names of images with ``channels``, or of labels."""
    if channels is None:
        return {f"{case}{ENDING}" for case in cases}
    return {f"{case}_{channel:04d}{ENDING}" for case in cases for channel in range(channels)}


def _describe(folder: Path, conversion: Conversion) -> None:
    """Complete dataset.json; nnU-Net compares numTraining with the cases, and some downloads count wrong."""
    path = folder / "dataset.json"
    write_json(path, read_json(path) | conversion.about | {"numTraining": len(conversion.training)})
