"""What a training left behind: its figures and its curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from masksam_nnunet.environment import TRAINING_STATS_FILE
from masksam_nnunet.errors import CheckpointError, DemoError
from masksam_nnunet.files import read_json


@dataclass(frozen=True)
class TrainingStats:
    """The content of training_stats.json, written by the time-budget trainers.

    Attributes:
        train_seconds: from the first iteration to the end of the last epoch's short validation on patches.
        iterations: optimizer steps.
        peak_memory_mb: in MiB.
        peak_memory_of: what was measured: the GPU's allocations or the process.
        parameters: of the network.
        trainable_parameters: those that were trained.
        epochs: of nnU-Net's loop.
        batch_size: as trained.
        patch_size: as trained, (D, H, W) or (H, W).
        device: as torch names it.
    """

    train_seconds: float
    iterations: int
    peak_memory_mb: float
    peak_memory_of: str
    parameters: int
    trainable_parameters: int
    epochs: int
    batch_size: int
    patch_size: tuple[int, ...]
    device: str

    @classmethod
    def read(cls, fold: Path) -> TrainingStats:
        """Read the figures of a trained fold.

        Raises:
            DemoError: if the file is missing or lacks a figure.
        """
        path = fold / TRAINING_STATS_FILE
        try:
            content: dict[str, Any] = read_json(path)
            values = {field.name: content[field.name] for field in fields(cls)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DemoError(f"{path}: no usable figures of the training ({error!r})") from error
        return cls(**values | {"patch_size": tuple(values["patch_size"])})


@dataclass(frozen=True)
class History:
    """nnU-Net's log, one value per epoch.

    Attributes:
        seconds: of all epochs up to the end of each; breaks before a resumption do not count.
        train_loss: the method's own loss.
        val_loss: nnU-Net's loss on validation patches.
        pseudo_dice: mean foreground Dice over validation patches.
    """

    seconds: tuple[float, ...]
    train_loss: tuple[float, ...]
    val_loss: tuple[float, ...]
    pseudo_dice: tuple[float, ...]

    @classmethod
    def read(cls, checkpoint: Path) -> History:
        """Read the curves in a checkpoint of our own training.

        Raises:
            DemoError: if the file cannot be read as nnU-Net's checkpoint, or its log lacks a curve.
        """
        log = read_log(checkpoint)
        try:
            curves = [[float(value) for value in log[key]] for key in ("train_losses", "val_losses", "mean_fg_dice")]
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(checkpoint, error) from error
        seconds = list(accumulate(epoch_seconds(log, checkpoint)))
        epochs = min(len(seconds), *map(len, curves))
        return cls(*(tuple(values[:epochs]) for values in (seconds, *curves)))


def read_log(checkpoint: Path) -> Mapping[str, Any]:
    """nnU-Net's log in a checkpoint; the weights are left alone, and no code of the file is run.

    Raises:
        DemoError: if the file cannot be read as nnU-Net's checkpoint.
    """
    from masksam_nnunet.checkpoints import load_checkpoint  # torch, not where a job only waits: it takes a gigabyte

    try:
        log: Mapping[str, Any] = load_checkpoint(checkpoint)["logging"]
    except CheckpointError as error:
        raise DemoError(str(error)) from error
    except KeyError as error:
        raise _unreadable(checkpoint, error) from error
    return log


def epoch_seconds(log: Mapping[str, Any], checkpoint: Path) -> list[float]:
    """What each finished epoch took; an epoch may have begun that is not finished.

    Raises:
        DemoError: if the log does not tell.
    """
    try:
        spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        return [float(end - start) for start, end in spans]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> DemoError:
    return DemoError(f"{checkpoint} cannot be read as a checkpoint ({error!r}); train this fold again")
