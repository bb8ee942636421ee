"""Trainers that stop by the clock, or after a number of iterations."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_plans import SMALL_UNET, dataset_json, folders, plain_plans, simple_cost, tiny_plans

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.config import ConfigError
from masksam_nnunet.trainers import (
    MaskSAMTrainer_lite_medsam_budget,
    MaskSAMTrainer_tiny_budget,
    nnUNetTrainer_adamw_budget,
)


class Loader:
    """Batches without end."""

    def __next__(self) -> dict[str, torch.Tensor]:
        return {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32))}


class Timed(MaskSAMTrainer_tiny_budget):
    """Each iteration takes ``seconds`` by the clock, and the fifth of all is asked to be the last."""

    now, seconds = 0.0, 2.0
    steps: list[tuple[int, int, float, float]]

    def on_train_start(self) -> None:  # nnU-Net's own needs data
        self.dataloader_train = self.dataloader_val = Loader()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        Timed.now += self.seconds
        self.steps.append(
            (self.current_epoch, self.iterations_done, self.own_seconds(), self.optimizer.param_groups[0]["lr"])
        )
        if len(self.steps) == 5:
            signal.raise_signal(signal.SIGUSR2)
        return outputs


@pytest.fixture(autouse=True)
def _clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", "1")
    monkeypatch.setattr("masksam_nnunet.trainers.time_budget.time.monotonic", lambda: Timed.now)
    monkeypatch.setattr(Timed, "now", 0.0)
    monkeypatch.setattr(Timed, "steps", [], raising=False)


def trainer() -> Timed:
    made = Timed(tiny_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.initialize()
    made.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch here
    return made


def left_and_continued() -> Timed:
    """A training that was asked to end, in the process that continued it."""
    with pytest.raises(SystemExit):
        trainer().run_training()
    made = trainer()
    made.load_checkpoint(str(Path(made.output_folder) / "checkpoint_latest.pth"))
    made.run_training()
    return made


def test_a_budget_ends_its_schedule_and_goes_on_within_an_epoch() -> None:
    """60 seconds in epochs of 6, each iteration 2 of them."""
    made = trainer()
    folder = Path(made.output_folder)
    with pytest.raises(SystemExit) as left:
        made.run_training()
    assert left.value.code == 75 and made.steps[-1][:3] == (1, 5, 10.0)
    Timed.now = 10_000.0  # when the job is started again
    made = trainer()
    made.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    made.run_training()
    assert [step[:3] for step in made.steps] == [(n // 3, n + 1, 2.0 * (n + 1)) for n in range(30)]
    assert made.steps[-1][3] < 0.3 * max(step[3] for step in made.steps), "the learning rate"
    assert made.iteration == made.iterations_done == 30, "of the warm-up too"
    assert load_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 10
    stats = json.loads((folder / "training_stats.json").read_text())
    assert stats | {"epochs": 10, "iterations": 30, "train_seconds": 60.0, "budget_seconds": 60.0} == stats
    assert stats["peak_memory_mib"] > 100 and "CPU cores" in stats["device"]
    assert stats["parameters"] > stats["trainable_parameters"] > 1000
    assert json.loads((folder / "budget_progress.json").read_text())["fraction"] == 1.0


def test_writing_checkpoints_does_not_count_and_slow_iterations_end_with_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Iterations of half a budget: two of them, not one for each of ten epochs."""
    monkeypatch.setattr(Timed, "seconds", 30.0)
    write = torch.save

    def slow_write(*arguments: Any) -> None:
        Timed.now += 7.0
        write(*arguments)

    monkeypatch.setattr(torch, "save", slow_write)
    made = trainer()
    made.run_training()
    assert [step[2] for step in made.steps] == [30.0, 60.0]


def test_a_number_of_iterations_takes_the_place_of_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 of them in two epochs, however long they take, and continued by their number."""
    monkeypatch.setenv("MASKSAM_BUDGET_ITERATIONS", "13")
    monkeypatch.setattr(Timed, "seconds", 300.0)
    made = left_and_continued()
    assert [step[:2] for step in made.steps] == [(n // 7, n + 1) for n in range(13)]
    stats = json.loads((Path(made.output_folder) / "training_stats.json").read_text())
    assert stats | {"iterations": 13, "budget_iterations": 13, "train_seconds": 13 * 300.0} == stats
    monkeypatch.setenv("MASKSAM_BUDGET_ITERATIONS", "many")
    with pytest.raises(ConfigError, match="MASKSAM_BUDGET_ITERATIONS = 'many'"):
        trainer()


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_that_was_left_after_its_last_iteration_is_ended(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_BUDGET_ITERATIONS", str(5 * epochs))
    made = left_and_continued()
    assert [step[:2] for step in made.steps] == [(n // 5, n + 1) for n in range(5 * epochs)]
    assert load_checkpoint(Path(made.output_folder) / "checkpoint_final.pth")["current_epoch"] == epochs


def test_nnunet_with_adamw_warms_up_and_decays() -> None:
    plans = plain_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = SMALL_UNET
    plans["configurations"]["3d_fullres"]["architecture"]["_kw_requires_import"] = ["conv_op", "norm_op", "nonlin"]
    made = nnUNetTrainer_adamw_budget(plans, "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.initialize()
    assert isinstance(made.optimizer, torch.optim.AdamW)
    rates = []
    for done, seconds in ((0, 0.0), (19, 0.0), (50, 30.0)):
        made.iterations_done, made.common_seconds = done, seconds
        made.set_learning_rate()
        rates.append(made.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 / 20, 1e-3, 1e-3 * 0.5**0.9])
    made.on_train_epoch_start()
    assert made.logger.get_value("lrs", step=-1) == rates[-1], "nnU-Net logs the rate that is used"


def test_short_trainings_of_litemedsam_have_a_rate_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masksam_nnunet.plans.architecture.training_cost", simple_cost)
    made = MaskSAMTrainer_lite_medsam_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    assert (made.config.backbone, made.initial_lr, made.warmup_iterations) == ("lite_medsam", 2e-3, 30)


@pytest.mark.parametrize("text", ["", "0", "soon", "inf"])
def test_a_missing_or_senseless_budget_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", text)
    with pytest.raises(ConfigError, match="MASKSAM_BUDGET_MINUTES = "):
        trainer()


@pytest.mark.parametrize("cls", [nnUNetTrainer_adamw_budget, MaskSAMTrainer_tiny_budget])
def test_no_method_is_compiled_within_its_budget_unasked(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    made = cls(tiny_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.device = torch.device("cuda")
    assert not made._do_i_compile()
    monkeypatch.setenv("nnUNet_compile", "1")
    assert made._do_i_compile() == (os.name != "nt")
