"""Training for a number of minutes instead of a number of epochs, so that two methods get the same time."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import BUDGET_MINUTES, BUDGET_PROGRESS_FILE, TRAINING_STATS_FILE
from masksam_nnunet.files import write_json

from .batches import Batches
from .resumable import ResumableTrainer
from .save_interval import SaveInterval
from .variants import MaskSAMTrainer_tiny

PROGRESS_EVERY = 2.0  # seconds
VALIDATION_SHARE = 0.1  # of an epoch's time, for validation on patches


def budget_seconds() -> float:
    """The budget that the environment names.

    Raises:
        ConfigError: if it names none, or nonsense.
    """
    text = os.environ.get(BUDGET_MINUTES, "")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(
            f"{BUDGET_MINUTES} = {text!r}: set it to the minutes of training, for example {BUDGET_MINUTES}=3"
        )
    return 60 * minutes


class nnUNetTrainer_budget(ResumableTrainer):
    """Stock nnU-Net, trained for ``MASKSAM_BUDGET_MINUTES``; its polynomial schedule ends with the budget.

    The budget is divided into at most ten epochs, each of which ends with a short validation that counts too. Writes
    ``budget_progress.json`` while it trains and ``training_stats.json`` at the end, both into the fold's folder.

    Saves its latest checkpoint after every epoch, so that one that was broken off goes on (``--c``) with the seconds
    and iterations that the checkpoint had used. Writing checkpoints does not count: how often is not the method's.
    """

    save_default = SaveInterval(epochs=1)

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ) -> None:
        self.budget = budget_seconds()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 10
        self.num_val_iterations_per_epoch = 5
        self.iterations_done = 0
        self._started = self._reported = self._epoch_end = 0.0
        self._own: Mapping[str, Any] = {}  # of the checkpoint that was loaded
        self._epochs: list[tuple[float, int]] = []
        self._peak_before = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that are used."""
        return time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        return min(1.0, self.elapsed / self.budget)

    def on_loop_start(self) -> None:
        self._started = time.monotonic() - self._restore()

    def training_goes_on(self) -> bool:
        return self.elapsed < self.budget

    def run_epoch(self, train: Batches, validation: Batches) -> None:
        """Epochs end by the clock: there are fewer of them where an iteration is slow."""
        share = self.budget / self.num_epochs
        self._epoch_end = min(self.budget, (self.elapsed // share + 1) * share)
        super().run_epoch(train, validation)

    def epoch_goes_on(self, done: int) -> bool:
        return not done or self.elapsed < self._epoch_end

    def validation_goes_on(self, done: int) -> bool:
        """As many patches as fit: it counts as training time."""
        end = self._epoch_end + VALIDATION_SHARE * self.budget / self.num_epochs
        return not done or (done < self.num_val_iterations_per_epoch and self.elapsed < end)

    def on_train_end(self) -> None:
        self._write_stats()
        super().on_train_end()

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {
            "seconds": self.elapsed,
            "iterations": self.iterations_done,
            "epochs": list(self._epochs),
            "peak_memory_mb": self._peak(),
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        self._own = state

    def _restore(self) -> float:
        """Seconds that a training which now goes on had used at its checkpoint; its iterations are taken over."""
        before = self._own or self._told_beside_the_checkpoint()
        self._epochs = [(float(s), int(n)) for s, n in before.get("epochs", [])]
        self._peak_before = float(before.get("peak_memory_mb", 0.0))
        self.iterations_done = int(before.get("iterations", 0))
        return float(before.get("seconds", 0.0))

    def _told_beside_the_checkpoint(self) -> Mapping[str, Any]:
        """What earlier versions left in a file instead of the checkpoint, by epoch."""
        file = Path(self.output_folder) / BUDGET_PROGRESS_FILE
        if self.current_epoch == 0 or not file.is_file():
            return {}
        before: dict[str, Any] = json.loads(file.read_text())
        # The checkpoint may be older than the moment of the break, or be the best instead of the latest.
        epochs = before.get("epochs", [])[: self.current_epoch]
        if len(epochs) < self.current_epoch:  # written by a still earlier version
            epochs = [(before["seconds"], before["iterations"])] * self.current_epoch
        seconds, iterations = epochs[-1]
        return {**before, "epochs": epochs, "seconds": seconds, "iterations": iterations}

    def on_epoch_end(self) -> None:
        self._epochs.append((self.elapsed, self.iterations_done))
        self._write_progress(None)
        super().on_epoch_end()

    def save(self, file: Path, must: bool) -> None:
        """The budget's clock stands still meanwhile."""
        before = time.monotonic()
        super().save(file, must)
        self._started += time.monotonic() - before

    def set_learning_rate(self) -> None:
        """nnU-Net's polynomial decay, by the clock."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * (1 - self.progress) ** 0.9

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.set_learning_rate()
        outputs = super().train_step(batch)
        self.iterations_done += 1
        if time.monotonic() - self._reported > PROGRESS_EVERY:
            self._reported = time.monotonic()
            loss = float(outputs["loss"])
            self._write_progress(loss if math.isfinite(loss) else None)
        return outputs

    def _write_progress(self, loss: float | None) -> None:
        self._write(
            BUDGET_PROGRESS_FILE,
            {
                "fraction": self.progress,
                "iterations": self.iterations_done,
                "loss": loss,
                "seconds": self.elapsed,
                "epochs": self._epochs,
                "peak_memory_mb": self._peak(),
            },
        )

    def _peak(self) -> float:
        return max(self._peak_before, peak_memory_mb(self.device))

    def _write_stats(self) -> None:
        parameters = list(self.network.parameters())
        self._write(
            TRAINING_STATS_FILE,
            {
                "train_seconds": self.elapsed,
                "iterations": self.iterations_done,
                "epochs": self.current_epoch,
                "budget_seconds": self.budget,
                "peak_memory_mb": self._peak(),
                "peak_memory_of": peak_memory_of(self.device),
                "parameters": sum(p.numel() for p in parameters),
                "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
                "batch_size": self.batch_size,
                "patch_size": [int(size) for size in self.configuration_manager.patch_size],
                "device": str(self.device),
            },
        )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        try:
            write_json(Path(self.output_folder) / name, content)
        except OSError as error:  # a full disk is no reason to end a training
            self.print_to_log_file(f"WARNING: {name} could not be written: {error}")


class MaskSAMTrainer_tiny_budget(nnUNetTrainer_budget, MaskSAMTrainer_tiny):
    """The tiny MaskSAM, trained for ``MASKSAM_BUDGET_MINUTES``; its schedule ends with the budget."""

    def set_learning_rate(self) -> None:
        MaskSAMTrainer_tiny.set_learning_rate(self)  # warm-up, and decay by the budget's progress

    def _restore(self) -> float:
        seconds = super()._restore()
        self.iteration = self.iterations_done  # of the warm-up; an epoch here has no fixed number of them
        return seconds


def peak_memory_of(device: torch.device) -> str:
    """What :func:`peak_memory_mb` measures."""
    return "GPU allocations" if device.type == "cuda" else "process, resident"


def peak_memory_mb(device: torch.device) -> float:
    """This process's highest memory so far, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss there is at least what the process that started this one had
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) / 1024
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
