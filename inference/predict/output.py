"""The files of a predicted case, which are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import UsageError
from masksam_nnunet.plans.images import check_whole

from .postprocessing import Postprocessing

PROBABILITIES = (".npz", ".pkl")
"""What nnU-Net writes beside a label map when it saves probabilities."""


def files_of(target: Path, ending: str) -> list[Path]:
    """All files that a case can have, the label map last.

    Args:
        target: folder and name of the case, without a file's ending, as nnU-Net's functions take it.
        ending: of label maps.
    """
    return [target.with_name(target.name + end) for end in (*PROBABILITIES, ending)]


@contextlib.contextmanager
def draft(
    target: Path, ending: str, reader: Any, probabilities: bool, postprocessing: Postprocessing | None = None
) -> Iterator[Path]:
    """Yield a target to write a case's files to; they move to ``target`` once all can be read back.

    Until then they lie in a hidden folder beside it, which the next attempt on this case clears. Post-processing is
    applied to the label map, not to the probabilities, as in nnU-Net.

    Raises:
        UsageError: the disk is full or not writable.
    """
    folder = target.with_name(f".{target.name}.draft")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        name = folder / target.name
        yield name
        if postprocessing is not None:
            postprocessing.apply(name.with_name(name.name + ending), reader)
        if not is_whole(name, ending, reader, probabilities):
            raise OSError(errno.ENOSPC, "it cannot be read back, the disk may be full")
        for file, place in zip(files_of(name, ending), files_of(target, ending), strict=True):
            if file.is_file():
                os.replace(file, place)
    except OSError as error:
        raise UsageError(
            f"-o: cannot write the prediction of {target.name} to {target.parent}: {error.strerror or error}; make "
            "room or make the folder writable, and add --continue_prediction"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_whole(target: Path, ending: str, reader: Any, probabilities: bool) -> bool:
    """Whether a case's label map, and its probabilities if wanted, exist and can be read to their end."""
    *more, label_map = files_of(target, ending)
    try:
        check_whole(label_map)
        reader.read_seg(str(label_map))
        return not probabilities or _are_whole(*more)
    except Exception:  # each reader has errors of its own
        return False


def remove(target: Path, ending: str) -> None:
    """Remove all files of a case."""
    for file in files_of(target, ending):
        file.unlink(missing_ok=True)


def _are_whole(archive: Path, properties: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as opened:
            whole = opened.testzip() is None and "probabilities.npy" in opened.namelist()
    except (zipfile.BadZipFile, zlib.error):
        return False
    return whole and properties.read_bytes()[-1:] == b"."  # how every pickle ends
