"""What nnU-Net logged of a training, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import CheckpointError


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
        """Read the curves in a checkpoint.

        Raises:
            CheckpointError: the file is not nnU-Net's checkpoint, or its log has no such curve.
        """
        log = read_log(checkpoint).log
        try:
            curves = [[float(value) for value in log[key]] for key in ("train_losses", "val_losses", "mean_fg_dice")]
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(checkpoint, error) from error
        seconds = list(accumulate(epoch_seconds(log, checkpoint)))
        epochs = min(len(seconds), *map(len, curves))
        return cls(*(tuple(values[:epochs]) for values in (seconds, *curves)))


@dataclass(frozen=True)
class LoggedTraining:
    """nnU-Net's log in a checkpoint, and the number of values that the checkpoint's network has."""

    log: Mapping[str, Any]
    parameters: int


def read_log(checkpoint: Path) -> LoggedTraining:
    """Read nnU-Net's log in a checkpoint. No code in the file is run.

    Raises:
        CheckpointError: the file is not nnU-Net's checkpoint.
    """
    content = load_checkpoint(checkpoint)
    # nnU-Net's networks list many tensors under several names.
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in content["network_weights"].values()}
    try:
        return LoggedTraining(dict(content["logging"]), sum(sizes.values()))
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error


def epoch_seconds(log: Mapping[str, Any], checkpoint: Path) -> list[float]:
    """The seconds of each finished epoch.

    Raises:
        CheckpointError: the log has no times.
    """
    try:
        spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        return [float(end - start) for start, end in spans]  # an epoch that has begun may not have ended
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint} has no usable log of its training ({error!r}); train this fold again")
