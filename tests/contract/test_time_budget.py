"""Trainers that stop by the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plain_plans import dataset_json, folders, plain_plans

from masksam_nnunet.config import ConfigError
from masksam_nnunet.trainers import MaskSAMTrainer_vit_t_budget


@pytest.fixture()
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MaskSAMTrainer_vit_t_budget:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", "0.05")
    made = MaskSAMTrainer_vit_t_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.initialize()
    return made


def test_the_schedule_ends_with_the_budget(
    trainer: MaskSAMTrainer_vit_t_budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    batch = {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32))}

    class Loader:
        def __next__(self) -> dict[str, torch.Tensor]:
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            return batch

    trainer.dataloader_train = trainer.dataloader_val = Loader()  # type: ignore[assignment]
    monkeypatch.setattr(trainer, "on_train_start", lambda: None)
    trainer.run_training()
    assert len(trainer.logger.get_value("train_losses", step=None)) == trainer.current_epoch
    stats = json.loads((Path(trainer.output_folder) / "training_stats.json").read_text())
    assert 1 <= stats["epochs"] <= 10 and stats["iterations"] >= stats["epochs"]
    assert trainer.budget <= stats["train_seconds"] and stats["peak_memory_mb"] > 100
    assert trainer.progress == 1.0 and rates[-1] < 0.3 * max(rates)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


def test_slow_iterations_do_not_overrun_the_budget_by_more_than_one_epoch(
    trainer: MaskSAMTrainer_vit_t_budget, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(trainer, "_validate", lambda end: None)
    trainer.dataloader_train = iter([None] * 20)  # type: ignore[assignment]
    trainer.run_training()
    assert trainer.iterations_done == 2


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "inf"])
def test_a_missing_or_senseless_budget_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", text)
    with pytest.raises(ConfigError, match="MASKSAM_BUDGET_MINUTES = "):
        MaskSAMTrainer_vit_t_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
