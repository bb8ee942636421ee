"""Training for a number of minutes or iterations instead of epochs, so that two methods get the same."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import BUDGET_ITERATIONS, BUDGET_MINUTES, BUDGET_PROGRESS_FILE, number_in
from masksam_nnunet.method import find_method

from .loading import LoaderWatch
from .masksam import MaskSAMTrainer
from .resumable import RateOfTrainer, ResumableTrainer
from .variants import MaskSAMTrainer_lite_medsam, MaskSAMTrainer_tiny

PROGRESS_EVERY = 2.0  # seconds
VALIDATION_SHARE = 0.1  # of an epoch's time, for validation on patches


def budget_seconds() -> float:
    """The budget that ``MASKSAM_BUDGET_MINUTES`` sets.

    Raises:
        ConfigError: it is not set to a positive number.
    """
    text = os.environ.get(BUDGET_MINUTES, "")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(
            f"{BUDGET_MINUTES} = {text!r} is not allowed: set it to minutes of training, such as 3, or set "
            f"{BUDGET_ITERATIONS}"
        )
    return 60 * minutes


class nnUNetTrainer_budget(ResumableTrainer):
    """Stock nnU-Net, trained for ``MASKSAM_BUDGET_MINUTES``, or for ``MASKSAM_BUDGET_ITERATIONS`` where that is set.

    Its polynomial schedule ends with the budget, which is divided into at most ten epochs, each of which ends with a
    short validation that counts too; the validation after them does without mirroring. ``budget_progress.json`` in the
    fold's folder shows how far the training is. A resumed training (``--c``) continues with the seconds and iterations
    that its checkpoint had used. Writing checkpoints does not count.
    """

    save_default = (1, None)
    warmup_iterations = 0

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ) -> None:
        iterations = number_in(BUDGET_ITERATIONS)
        self.counted = iterations is not None
        self.budget: float = budget_seconds() if iterations is None else iterations
        """In iterations if they are counted, else in seconds."""
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 10 if iterations is None else max(1, min(10, iterations // 5))
        self.num_val_iterations_per_epoch = 2 if self.counted else 5
        self.iterations_done = 0
        self._seconds_before = 0.0  # of training, in the processes before this one
        self._started = self._reported = self._epoch_end = 0.0

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateOfTrainer]:
        optimizer, _ = super().configure_optimizers()
        return optimizer, RateOfTrainer(self)

    def own_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def used(self) -> float:
        """What is used of the budget, in its unit, when the last iteration ended: ranks must agree on it."""
        return self.iterations_done if self.counted else self.common_seconds

    @property
    def progress(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        return min(1.0, self.used / self.budget)

    def on_loop_start(self) -> None:
        self._started = time.monotonic() - self._seconds_before
        self.common_seconds = self._seconds_before
        self.iteration = self.iterations_done  # MaskSAM's own count: an epoch has no fixed number of them here

    def training_goes_on(self) -> bool:
        return bool(self.outputs) or self.used < self.budget  # an epoch that was left goes on to its end

    def run_epoch(self, train: LoaderWatch, validation: LoaderWatch) -> None:
        """Epochs end by the budget: there are fewer of them where an iteration is slow."""
        if not self.outputs:  # not the rest of one
            share = self.budget / self.num_epochs
            done = math.floor(self.used / share + 1e-6)  # 26 // 5.2 is 4
            self._epoch_end = min(self.budget, (done + 1) * share)
        super().run_epoch(train, validation)

    def epoch_goes_on(self, done: int) -> bool:
        return not done or self.used < self._epoch_end

    def validation_goes_on(self, done: int) -> bool:
        """As many patches as fit: it counts as training time."""
        end = self._epoch_end + VALIDATION_SHARE * self.budget / self.num_epochs
        return not done or (done < self.num_val_iterations_per_epoch and self.used < end)

    def training_stats(self) -> dict[str, Any]:
        return super().training_stats() | {
            "train_seconds": self.common_seconds,
            "iterations": self.iterations_done,
            "budget_iterations" if self.counted else "budget_seconds": self.budget,
        }

    def own_state(self) -> dict[str, Any]:
        own = {"seconds": self.common_seconds, "iterations": self.iterations_done, "epoch_end": self._epoch_end}
        return super().own_state() | own

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        self._seconds_before = float(state.get("seconds", 0.0))
        self.iterations_done = int(state.get("iterations", 0))
        self._epoch_end = min(self.budget, float(state.get("epoch_end", 0.0)))

    def on_epoch_end(self) -> None:
        self._write_progress(None)
        super().on_epoch_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Without mirroring, which would take several times as long as a short training itself."""
        axes, self.inference_allowed_mirroring_axes = self.inference_allowed_mirroring_axes, None
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.inference_allowed_mirroring_axes = axes

    def save(self, file: Path, must: bool) -> None:
        """The clock stands still meanwhile."""
        before = time.monotonic()
        super().save(file, must)
        self._started += time.monotonic() - before

    def set_learning_rate(self) -> None:
        """Linear warm-up, and nnU-Net's polynomial decay by the budget."""
        warm = min(1.0, (self.iterations_done + 1) / max(1, self.warmup_iterations))
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * warm * (1 - self.progress) ** 0.9

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
        progress = {
            "fraction": self.progress,
            "iterations": self.iterations_done,
            "loss": loss,
            "seconds": self.common_seconds,
        }
        self.write_beside_checkpoints(BUDGET_PROGRESS_FILE, progress)


class nnUNetTrainer_adamw_budget(nnUNetTrainer_budget):
    """The same U-Net and loss with AdamW: SGD with momentum 0.99 needs hundreds of iterations to get going."""

    warmup_iterations = 20

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateOfTrainer]:
        self.initial_lr = 1e-3
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, RateOfTrainer(self)


class MaskSAMTrainer_budget(nnUNetTrainer_budget, MaskSAMTrainer):
    """MaskSAM, trained for a budget; with a frozen SAM at a learning rate for short trainings."""

    tells_hours = False

    def set_recipe(self) -> None:
        super().set_recipe()
        if self.config.sam:
            self.initial_lr, self.warmup_iterations = find_method(self.config.method).short_rate, 30


class MaskSAMTrainer_tiny_budget(MaskSAMTrainer_budget, MaskSAMTrainer_tiny):
    """The tiny MaskSAM, trained for a budget."""


class MaskSAMTrainer_lite_medsam_budget(MaskSAMTrainer_budget, MaskSAMTrainer_lite_medsam):
    """MaskSAM with LiteMedSAM, trained for a budget."""
