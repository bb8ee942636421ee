"""Training for a number of minutes instead of a number of epochs, so that two methods get the same time."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import BUDGET_MINUTES, BUDGET_PROGRESS_FILE, TRAINING_STATS_FILE

from .variants import MaskSAMTrainer_vit_t

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


class nnUNetTrainer_budget(nnUNetTrainer):
    """Stock nnU-Net, trained for ``MASKSAM_BUDGET_MINUTES``; its polynomial schedule ends with the budget.

    The budget is divided into at most ten epochs, each of which ends with a short validation that counts too. Writes
    ``budget_progress.json`` while it trains and ``training_stats.json`` at the end, both into the fold's folder.

    Saves its latest checkpoint after every epoch, so that one that was broken off goes on (``--c``) with the seconds
    and iterations that the checkpoint had used. Writing checkpoints does not count: how often is not the method's.
    """

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
        self.save_every = 1
        self.iterations_done = 0
        self._started = self._reported = 0.0
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

    def run_training(self) -> None:
        """nnU-Net's own loop, with epochs that end by the clock: fewer of them where an iteration is slow."""
        self.on_train_start()
        self._started = time.monotonic() - self._restore()
        share = self.budget / self.num_epochs
        while self.elapsed < self.budget:
            end = min(self.budget, (self.elapsed // share + 1) * share)
            self.on_epoch_start()
            self.on_train_epoch_start()
            train_outputs = [self.train_step(next(self.dataloader_train))]
            while self.elapsed < end:
                train_outputs.append(self.train_step(next(self.dataloader_train)))
            self.on_train_epoch_end(train_outputs)
            self._validate(end + VALIDATION_SHARE * share)
            self.on_epoch_end()
        self._write_stats()
        self.on_train_end()

    def _validate(self, end: float) -> None:
        """nnU-Net's validation on patches, of as many as fit: it counts as training time."""
        with torch.no_grad():
            self.on_validation_epoch_start()
            outputs = [self.validation_step(next(self.dataloader_val))]
            while len(outputs) < self.num_val_iterations_per_epoch and self.elapsed < end:
                outputs.append(self.validation_step(next(self.dataloader_val)))
            self.on_validation_epoch_end(outputs)

    def _restore(self) -> float:
        """Seconds that a training which now goes on had used at its checkpoint; its iterations are taken over."""
        file = Path(self.output_folder) / BUDGET_PROGRESS_FILE
        if self.current_epoch == 0 or not file.is_file():
            return 0.0
        before = json.loads(file.read_text())
        self._peak_before = float(before.get("peak_memory_mb", 0.0))
        # By epoch: the checkpoint may be older than the moment of the break, or be the best instead of the latest.
        self._epochs = [(float(s), int(n)) for s, n in before.get("epochs", [])][: self.current_epoch]
        if len(self._epochs) < self.current_epoch:  # written by an earlier version
            self._epochs = [(float(before["seconds"]), int(before["iterations"]))] * self.current_epoch
        seconds, self.iterations_done = self._epochs[-1]
        return seconds

    def on_epoch_end(self) -> None:
        self._epochs.append((self.elapsed, self.iterations_done))
        self._write_progress(None)  # before the checkpoint, which is of no use without it
        super().on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but a kill in the middle leaves the earlier file whole; the budget's clock stands still."""
        before = time.monotonic()
        partial = f"{filename}.part"
        super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:
            os.replace(partial, filename)
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
            self._write_progress(float(outputs["loss"]))
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
        file = Path(self.output_folder) / name
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(file)


class MaskSAMTrainer_vit_t_budget(nnUNetTrainer_budget, MaskSAMTrainer_vit_t):
    """The tiny MaskSAM, trained for ``MASKSAM_BUDGET_MINUTES``; its schedule ends with the budget."""

    def set_learning_rate(self) -> None:
        MaskSAMTrainer_vit_t.set_learning_rate(self)  # warm-up, and decay by the budget's progress

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
