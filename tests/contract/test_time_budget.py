"""Trainers that stop by the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plain_plans import dataset_json, folders, plain_plans

from masksam_nnunet.config import ConfigError
from masksam_nnunet.trainers import MaskSAMTrainer_tiny_budget


class Loader:
    """Batches without end, and after ``stop_after`` of them a break."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.left = stop_after

    def __next__(self) -> dict[str, torch.Tensor]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32))}


@pytest.fixture()
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MaskSAMTrainer_tiny_budget:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", "0.05")
    made = MaskSAMTrainer_tiny_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.initialize()
    made.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch here
    return made


def test_the_schedule_ends_with_the_budget(
    trainer: MaskSAMTrainer_tiny_budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    batch = {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32))}

    class NotingLoader:
        def __next__(self) -> dict[str, torch.Tensor]:
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            return batch

    trainer.dataloader_train = trainer.dataloader_val = NotingLoader()  # type: ignore[assignment]
    monkeypatch.setattr(trainer, "on_train_start", lambda: None)
    trainer.run_training()
    assert len(trainer.logger.get_value("train_losses", step=None)) == trainer.current_epoch
    stats = json.loads((Path(trainer.output_folder) / "training_stats.json").read_text())
    assert 1 <= stats["epochs"] <= 10 and stats["iterations"] >= stats["epochs"]
    assert trainer.budget <= stats["train_seconds"] and stats["peak_memory_mib"] > 100
    assert stats["parameters"] > stats["trainable_parameters"] > 1000 and "CPU cores" in stats["device"]
    assert trainer.progress == 1.0 and rates[-1] < 0.3 * max(rates)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


def test_a_training_that_was_broken_off_goes_on_with_its_budget(
    trainer: MaskSAMTrainer_tiny_budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskSAMTrainer_tiny_budget, "on_train_start", lambda self: None)
    folder = Path(trainer.output_folder)
    breaks = Loader()
    trainer.dataloader_train, trainer.dataloader_val = breaks, Loader()  # type: ignore[assignment]
    at_epoch_ends: list[tuple[float, int]] = []

    def break_off_after_the_first_epoch() -> None:
        at_epoch_ends.append((trainer.elapsed, trainer.iterations_done))
        MaskSAMTrainer_tiny_budget.on_epoch_end(trainer)
        if trainer.current_epoch == 1:
            breaks.left = 1

    monkeypatch.setattr(trainer, "on_epoch_end", break_off_after_the_first_epoch)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    assert not (folder / "checkpoint_final.pth").exists()
    used = trainer.elapsed

    goes_on = MaskSAMTrainer_tiny_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    goes_on.logger.plot_progress_png = lambda folder: None
    goes_on.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    goes_on.dataloader_train = goes_on.dataloader_val = Loader()  # type: ignore[assignment]
    first: list[tuple[int, int]] = []
    step = MaskSAMTrainer_tiny_budget.train_step

    def note(self: MaskSAMTrainer_tiny_budget, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not first:
            first.append((self.iterations_done, self.iteration))
        return step(self, batch)

    monkeypatch.setattr(MaskSAMTrainer_tiny_budget, "train_step", note)
    goes_on.run_training()
    iterations, warmed_up = first[0]
    # From the last epoch's checkpoint on, not from the moment of the break.
    assert at_epoch_ends[-1][0] <= goes_on._seconds_before < used
    assert iterations == warmed_up == at_epoch_ends[-1][1] > 0
    stats = json.loads((folder / "training_stats.json").read_text())
    assert stats["budget_seconds"] == trainer.budget
    assert trainer.budget <= stats["train_seconds"] < 2 * trainer.budget
    assert stats["iterations"] == goes_on.iterations_done > iterations
    assert stats["epochs"] == len(goes_on.logger.get_value("train_losses", step=None)) > 1
    assert not list(folder.glob("*.part"))


def test_writing_checkpoints_does_not_count(
    trainer: MaskSAMTrainer_tiny_budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("masksam_nnunet.trainers.time_budget.time.monotonic", lambda: clock[0])
    trainer._started = 90.0
    write = torch.save

    def slow_write(*arguments: object) -> None:
        clock[0] += 7.0
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", slow_write)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert trainer.elapsed == 10.0


def test_slow_iterations_do_not_overrun_the_budget_by_more_than_one_epoch(
    trainer: MaskSAMTrainer_tiny_budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations of half a budget: two of them, not one for each of ten epochs."""
    clock = [0.0]
    monkeypatch.setattr("masksam_nnunet.trainers.time_budget.time.monotonic", lambda: clock[0])

    def slow_step(batch: object) -> dict[str, float]:
        clock[0] += trainer.budget / 2
        trainer.iterations_done += 1
        return {"loss": 1.0}

    monkeypatch.setattr(trainer, "train_step", slow_step)
    for hook in ("on_train_start", "on_train_epoch_start", "on_epoch_start", "on_epoch_end", "on_train_end"):
        monkeypatch.setattr(trainer, hook, lambda: None)
    monkeypatch.setattr(trainer, "on_train_epoch_end", lambda outputs: None)
    monkeypatch.setattr(trainer, "_validate", lambda *_: None)
    trainer.dataloader_train = iter([{}] * 20)  # type: ignore[assignment]
    trainer.run_training()
    assert trainer.iterations_done == 2


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "inf"])
def test_a_missing_or_senseless_budget_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", text)
    with pytest.raises(ConfigError, match="MASKSAM_BUDGET_MINUTES = "):
        MaskSAMTrainer_tiny_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
