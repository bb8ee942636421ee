"""Checkpoint files: how often they are saved, how they are written, and which one a training continues from."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from masksam_nnunet.checkpoints import damage, load_checkpoint
from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import SAVE_EVERY
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.files import atomic_write

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"  # nnU-Net's own names

SaveInterval = tuple[int | None, float | None]
"""The latest checkpoint is saved after so many epochs, and after so many minutes, within an epoch too."""
_INTERVAL = re.compile(r"(\d+)\s*epochs?|(\d+(?:\.\d+)?)\s*min(?:utes?)?")


def save_interval(default: SaveInterval) -> SaveInterval:
    """Read ``MASKSAM_SAVE_EVERY``, such as ``10epochs``, ``15min`` or ``10epochs,15min``.

    Raises:
        ConfigError: it has another form.
    """
    text = os.environ.get(SAVE_EVERY, "").strip()
    if not text:
        return default
    found = [_INTERVAL.fullmatch(part.strip()) for part in text.split(",")]
    epochs = [int(part[1]) for part in found if part and part[1]]
    minutes = [float(part[2]) for part in found if part and part[2]]
    if None in found or 0 in (*epochs, *minutes) or len(epochs) > 1 or len(minutes) > 1:
        raise ConfigError(
            f"{SAVE_EVERY} = {text!r} is not allowed: give epochs, minutes, or both, such as 10epochs,15min"
        )
    return next(iter(epochs), None), next(iter(minutes), None)


def write(content: dict[str, Any], file: Path) -> None:
    """Write a checkpoint; a kill or power cut at any moment leaves the earlier file or this one, whole.

    Raises:
        TrainingError: the disk is full, not writable or fails. The earlier file is as it was.
    """
    try:
        with atomic_write(file) as draft:
            torch.save(content, str(draft))
            if not zipfile.is_zipfile(draft):
                raise OSError(f"only {draft.stat().st_size} bytes of it were written")
            with draft.open("rb+") as written:
                os.fsync(written.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:80]
        raise TrainingError(
            f"cannot write {file}: {reason}; is the disk full? Make room or make the folder writable. Earlier "
            "checkpoints are kept"
        ) from error


def remove_drafts(folder: Path) -> None:
    """Remove the files that a training left when it was killed while writing."""
    for file in folder.glob(".checkpoint_*.pth.*"):
        file.unlink(missing_ok=True)


def candidates(folder: Path) -> list[Path]:
    """What a training may continue from, in this order.

    A latest checkpoint that is newer than the final one is of a training that began again.
    """
    final, latest, best = (folder / name for name in (FINAL, LATEST, BEST))
    began_again = final.is_file() and latest.is_file() and latest.stat().st_mtime > final.stat().st_mtime
    return [latest, best, final] if began_again else [final, latest, best]


def load_whole(files: Sequence[Path], warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The first of ``files`` that is there and whole, and its content; ``warn`` is told of those that are damaged.

    Raises:
        TrainingError: none is whole.
        CheckpointError: the first whole file is not one of nnU-Net's checkpoints, or would run code.
    """
    damaged: list[str] = []
    for file in filter(Path.is_file, files):
        reason = damage(file)
        if reason is None:
            content = load_checkpoint(file)
            for line in damaged:
                warn(f"WARNING: {line}. {file.name} is used instead, of epoch {content.get('current_epoch', '?')}")
            return file, content
        damaged.append(f"{file} is damaged ({reason})")
    raise TrainingError(
        f"{'; '.join(damaged) or files[0]}: no whole checkpoint. Restore one from a backup; or continue with --c, "
        "which takes another of this fold; or move the damaged files away to train from epoch 0"
    )
