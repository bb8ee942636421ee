"""Checkpoint files: when they are saved, how they are written atomically, and which one a training continues from."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masksam_nnunet.checkpoints import damage, load_checkpoint
from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import SAVE_EVERY
from masksam_nnunet.errors import TrainingError

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
"""nnU-Net's own names."""
PREVIOUS = "checkpoint_previous.pth"
"""The latest before the present latest."""
ORDER = (FINAL, LATEST, PREVIOUS, BEST)
"""The order in which a training looks for one to continue from."""
_PART = ".part"
_INTERVAL = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>epochs?|min(utes?)?)")


@dataclass(frozen=True)
class SaveInterval:
    """How often the latest checkpoint is saved; both values count where both are given.

    Attributes:
        epochs: after every so many epochs.
        minutes: after so many minutes since the last save, within an epoch too.
    """

    epochs: int | None = None
    minutes: float | None = None

    @classmethod
    def chosen(cls, default: SaveInterval) -> SaveInterval:
        """Read ``MASKSAM_SAVE_EVERY``, such as ``10epochs``, ``15min`` or ``10epochs,15min``.

        Raises:
            ConfigError: it has another form.
        """
        text = os.environ.get(SAVE_EVERY, "").strip()
        if not text:
            return default
        values: dict[str, float] = {}
        for part in text.split(","):
            found = _INTERVAL.fullmatch(part.strip())
            number = float(found["number"]) if found else 0.0
            unit = "epochs" if found and found["unit"].startswith("epoch") else "minutes"
            if number <= 0 or unit in values or (unit == "epochs" and not number.is_integer()):
                raise ConfigError(
                    f"{SAVE_EVERY} = {text!r} is not allowed: give epochs, minutes, or both, such as 10epochs,15min"
                )
            values[unit] = number
        epochs = values.get("epochs")
        return cls(None if epochs is None else int(epochs), values.get("minutes"))


def write(content: dict[str, Any], file: Path, previous: Path | None = None) -> None:
    """Write a checkpoint; a kill or power cut at any moment leaves the earlier file or this one, whole.

    Args:
        content: what ``torch.save`` takes.
        file: its place.
        previous: where the file that is there now is kept; None replaces it.

    Raises:
        TrainingError: the disk is full, not writable or fails. The earlier file is as it was.
    """
    partial = file.with_name(file.name + _PART)
    try:
        torch.save(content, str(partial))
        if not zipfile.is_zipfile(partial):
            raise OSError(f"only {partial.stat().st_size} bytes of it were written")
        _flush_to_disk(partial)
        if previous is not None and file.is_file():
            _keep(file, previous)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
        kept = [name for name in ORDER if (file.parent / name).is_file()]
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:80]
        raise TrainingError(
            f"cannot write {file}: {reason}; is the disk full? Make room or make the folder writable. "
            f"Earlier checkpoints kept: {', '.join(kept) or 'none'}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some network file systems refuse it for folders
        _flush_to_disk(file.parent)


def remove_partial(folder: Path) -> None:
    """Remove the files that a training left when it was killed while writing."""
    for file in folder.glob(f"checkpoint_*.pth{_PART}"):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class WholeCheckpoint:
    """A whole checkpoint, and a warning for each newer one that is damaged."""

    file: Path
    content: dict[str, Any]
    damaged: tuple[str, ...] = ()


def newest_whole(folder: Path) -> WholeCheckpoint:
    """The checkpoint to continue from: the first whole one of final, latest, previous, best.

    Raises:
        TrainingError: none is whole.
        CheckpointError: the first whole file is not one of nnU-Net's checkpoints, or would run code.
    """
    damaged: dict[Path, str] = {}
    for file in (folder / name for name in ORDER if (folder / name).is_file()):
        reason = damage(file)
        if reason is None:
            content = load_checkpoint(file)
            return WholeCheckpoint(file, content, tuple(_warning(*one, file, content) for one in damaged.items()))
        damaged[file] = reason
    listed = "; ".join(f"{file.name}: {reason}" for file, reason in damaged.items())
    raise TrainingError(
        f"no checkpoint in {folder} is whole ({listed}). Restore one from a backup, or move the damaged files away to "
        "train this fold from epoch 0"
    )


def exactly(file: Path) -> dict[str, Any]:
    """The content of this checkpoint.

    Raises:
        TrainingError: it is damaged.
        CheckpointError: it is not one of nnU-Net's checkpoints, or would run code.
    """
    reason = damage(file)
    if reason is not None:
        raise TrainingError(
            f"{file} is damaged ({reason}): restore it from a backup, or continue the training with --c, which takes "
            "the newest whole checkpoint of this fold"
        )
    return load_checkpoint(file)


def _warning(file: Path, reason: str, other: Path, content: dict[str, Any]) -> str:
    minutes = max(0.0, file.stat().st_mtime - other.stat().st_mtime) / 60
    return (
        f"WARNING: {file} is damaged ({reason}). The training continues from {other.name}, saved {minutes:.0f} minutes "
        f"earlier at epoch {content.get('current_epoch', '?')}."
    )


def _keep(file: Path, previous: Path) -> None:
    """Give ``file`` a second name: no copy is needed, and at no moment is there no checkpoint."""
    partial = previous.with_name(previous.name + _PART)
    try:
        partial.unlink(missing_ok=True)
        os.link(file, partial)
        os.replace(partial, previous)
        partial.unlink(missing_ok=True)  # left where both names were already one file's
    except OSError:
        os.replace(file, previous)  # a file system without links


def _flush_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
