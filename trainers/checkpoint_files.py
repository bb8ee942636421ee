"""Checkpoint files: written whole or not at all, and found again when the newest of them is damaged."""

from __future__ import annotations

import contextlib
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masksam_nnunet.checkpoints import damage, load_checkpoint
from masksam_nnunet.errors import TrainingError

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
"""nnU-Net's own names."""
PREVIOUS = "checkpoint_previous.pth"
"""What was the latest before the latest."""
ORDER = (FINAL, LATEST, PREVIOUS, BEST)
"""In which a training goes on."""
_PART = ".part"


class NotWritten(TrainingError):
    """A checkpoint could not be written; what was there before is as it was."""


def write(content: dict[str, Any], file: Path, previous: Path | None = None) -> None:
    """Write a checkpoint; a kill or a power cut at any moment leaves the earlier one or this one, whole.

    Args:
        content: what ``torch.save`` takes.
        file: its place.
        previous: where the one that is there now is kept; None replaces it.

    Raises:
        NotWritten: the disk is full, not writable or fails.
    """
    partial = file.with_name(file.name + _PART)
    try:
        torch.save(content, str(partial))
        if not zipfile.is_zipfile(partial):
            raise OSError(f"only {partial.stat().st_size} bytes of it were written")
        _reach_the_disk(partial)
        if previous is not None and file.is_file():
            _keep(file, previous)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has no errors of its own
        raise NotWritten(f"cannot write {file}: {_reason(error)}; {_room(file.parent)}. {_earlier(file)}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some network file systems refuse it for folders
        _reach_the_disk(file.parent)


def remove_partial(folder: Path) -> None:
    """Remove what a training that was killed while it wrote has left."""
    for file in folder.glob(f"checkpoint_*.pth{_PART}"):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, and for each newer one what is wrong with it and what is lost, in words."""

    file: Path
    content: dict[str, Any]
    damaged: tuple[str, ...] = ()


def newest_whole(folder: Path) -> Found:
    """The checkpoint to go on from, in the order final, latest, previous, best.

    Raises:
        TrainingError: there are checkpoints, and none is whole.
        CheckpointError: the first whole file is none of nnU-Net's checkpoints, or asks for code to be run.
    """
    damaged: list[Path] = []
    reasons: list[str] = []
    there = [folder / name for name in ORDER if (folder / name).is_file()]
    for file in there:
        wrong = damage(file)
        if wrong is None:
            content = load_checkpoint(file)
            return Found(file, content, tuple(map(_said, damaged, reasons, [(file, content)] * len(damaged))))
        damaged.append(file)
        reasons.append(wrong)
    listed = "; ".join(f"{file.name}: {reason}" for file, reason in zip(damaged, reasons, strict=True))
    raise TrainingError(
        f"no checkpoint in {folder} is whole ({listed}). Put a whole copy of one there to go on from it; or move the "
        "damaged files away to train this fold again from its start"
    )


def exactly(file: Path) -> dict[str, Any]:
    """This checkpoint and no other.

    Raises:
        TrainingError: it is damaged.
        CheckpointError: it is none of nnU-Net's, or asks for code to be run.
    """
    wrong = damage(file)
    if wrong is not None:
        raise TrainingError(
            f"{file} is damaged ({wrong}): put a whole copy there; or go on with the training (--c), which takes the "
            "newest whole checkpoint of this fold"
        )
    return load_checkpoint(file)


def _said(file: Path, reason: str, instead: tuple[Path, dict[str, Any]]) -> str:
    other, content = instead
    minutes = max(0.0, file.stat().st_mtime - other.stat().st_mtime) / 60
    done = f"{content.get('current_epoch', '?')} epochs are done"
    return (
        f"WARNING: {file} is damaged ({reason}). The training goes on from {other.name}, at which {done}; what was "
        f"trained after it was written ({time.strftime('%F %T', time.localtime(other.stat().st_mtime))}), "
        f"{minutes:.0f} minutes before the damaged one, is lost."
    )


def _keep(file: Path, previous: Path) -> None:
    """Let ``file`` stay under a second name; that costs no copy, and at no moment is there none."""
    partial = previous.with_name(previous.name + _PART)
    try:
        partial.unlink(missing_ok=True)
        os.link(file, partial)
        os.replace(partial, previous)
        partial.unlink(missing_ok=True)  # where both names were one file's already
    except OSError:
        os.replace(file, previous)  # a file system without links


def _reach_the_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"the disk takes no more of it, being full, over a quota or faulty ({' '.join(str(error).split())[:80]})"


def _room(folder: Path) -> str:
    try:
        found = os.statvfs(folder) if hasattr(os, "statvfs") else None
    except OSError:
        found = None
    free = "" if found is None else f"{found.f_bavail * found.f_frsize / 2**20:.0f} MiB are free there; "
    return f"{free}make room or make the folder writable"


def _earlier(file: Path) -> str:
    kept = [name for name in ORDER if (file.parent / name).is_file()]
    return f"As they were: {', '.join(kept)}" if kept else "There is no earlier checkpoint"
