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
    stats = json.loads((Path(trainer.output_folder) / "training_stats.json").read_text())
    assert stats["epochs"] == 10 and stats["iterations"] >= 10
    assert stats["train_seconds"] >= trainer.budget and stats["peak_memory_mb"] > 100
    assert trainer.progress == 1.0 and rates[-1] < 0.3 * max(rates)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "inf"])
def test_a_missing_or_senseless_budget_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", text)
    with pytest.raises(ConfigError, match="MASKSAM_BUDGET_MINUTES = "):
        MaskSAMTrainer_vit_t_budget(plain_plans(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
