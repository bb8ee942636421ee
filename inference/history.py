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
        training = read_log(checkpoint)
        try:
            curves = [[float(v) for v in training.log[key]] for key in ("train_losses", "val_losses", "mean_fg_dice")]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint} has no usable log of its training ({error!r})") from error
        seconds = list(accumulate(training.epoch_seconds))
        epochs = min(len(seconds), *map(len, curves))
        return cls(*(tuple(values[:epochs]) for values in (seconds, *curves)))


@dataclass(frozen=True)
class LoggedTraining:
    """nnU-Net's log in a checkpoint, the seconds of each finished epoch, and the network's number of parameters."""

    log: Mapping[str, Any]
    epoch_seconds: list[float]
    parameters: int


def read_log(checkpoint: Path) -> LoggedTraining:
    """Read nnU-Net's log in a checkpoint. No code in the file is run.

    Raises:
        CheckpointError: the file is not nnU-Net's checkpoint, or its log has no times.
    """
    content = load_checkpoint(checkpoint)
    # nnU-Net's networks list many tensors under several names.
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in content["network_weights"].values()}
    try:
        log = dict(content["logging"])
        # An epoch that has begun may not have ended.
        spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        return LoggedTraining(log, [float(end - start) for start, end in spans], sum(sizes.values()))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} has no usable log of its training ({error!r})") from error
