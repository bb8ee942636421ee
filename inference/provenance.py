"""Where a result comes from: versions, this package's commit, and nnU-Net's log of a training."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import CheckpointError

PACKAGES = ("masksam-nnunet", "nnunetv2", "torch", "monai", "numpy", "SimpleITK", "nibabel", "scipy", "pandas")


def versions() -> dict[str, str]:
    """The versions of Python and of :data:`PACKAGES`."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_hash(file: str = __file__) -> str | None:
    """The commit of the checkout that holds ``file``, with ``+changes`` where files differ; None where none does."""
    path = Path(file).resolve()
    folder = path.parent
    try:
        # It must be the file's own, not one that an environment happens to lie in.
        subprocess.run(["git", "ls-files", "--error-unmatch", path], cwd=folder, check=True, capture_output=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@dataclass(frozen=True)
class History:
    """What nnU-Net logged of a training, one value for each finished epoch.

    Attributes:
        seconds: of all epochs up to the end of each; breaks before a resumption do not count.
        train_loss: the method's own loss.
        val_loss: nnU-Net's loss on validation patches.
        pseudo_dice: mean foreground Dice over validation patches.
        parameters: of the network.
    """

    seconds: tuple[float, ...]
    train_loss: tuple[float, ...]
    val_loss: tuple[float, ...]
    pseudo_dice: tuple[float, ...]
    parameters: int

    @classmethod
    def read(cls, checkpoint: Path) -> History:
        """Read the log in a checkpoint. No code in the file is run.

        Raises:
            CheckpointError: the file is not nnU-Net's checkpoint, or its log lacks a curve.
        """
        content = load_checkpoint(checkpoint)
        # nnU-Net's networks list many tensors under several names.
        sizes = {tensor.data_ptr(): tensor.numel() for tensor in content["network_weights"].values()}
        try:
            log = content["logging"]
            # An epoch that has begun may not have ended.
            spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
            seconds = accumulate(end - start for start, end in spans)
            curves = (log[key] for key in ("train_losses", "val_losses", "mean_fg_dice"))
            epochs = list(zip(seconds, *curves, strict=False))
            ends, train, val, dice = (tuple(float(epoch[n]) for epoch in epochs) for n in range(4))
            return cls(ends, train, val, dice, sum(sizes.values()))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint} has no usable log of its training ({error!r})") from error
