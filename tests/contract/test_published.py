"""The published settings as plans and trainers: one plan and one training command repeat them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_data import Kind
from plain_plans import dataset_json, folders, plain_plans, simple_cost
from rich.console import Console
from torch import nn

from masksam_nnunet import trainers
from masksam_nnunet.config import ConfigError
from masksam_nnunet.plans import architecture, sizing
from masksam_nnunet.plans.planning import plan_dataset
from masksam_nnunet.plans.presets import load_preset

CPU = torch.device("cpu")
ORGANS = {"acdc": 3, "synapse": 13, "amos": 15}


def planned(tmp_path: Path, preset: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(plans, dataset.json, what was printed) of ``masksam plan --preset`` on a small dataset with as many labels."""
    number = ORGANS[preset]
    kind = Kind(
        id=45,
        name="Recipe",
        sizes=[(6, 40, 40)] * 5,
        labels={"background": 0, **{f"organ {value}": value for value in range(1, number + 1)}},
        values=tuple(range(1, number + 1)),
    )
    kind.write(tmp_path / "nnUNet_raw")
    kind.write_fingerprint(tmp_path / "nnUNet_preprocessed")
    console = Console(record=True, width=300, file=io.StringIO())
    plans = plan_dataset("45", preset=preset, console=console).plans
    return plans | {"continue_training": False}, dataset_json(number + 1), console.export_text()


@pytest.mark.parametrize("preset", ORGANS)
def test_plan_and_trainer_are_the_published_setting(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(sizing, "training_cost", simple_cost)
    plans, description, text = planned(tmp_path, preset)
    setting = load_preset(preset)
    settings = plans["configurations"]["3d_fullres"]
    assert (settings["patch_size"], settings["batch_size"]) == (list(setting.patch_size), 2)
    assert f"-p MaskSAMPlans -tr {setting.trainer}" in text

    trainer = getattr(trainers, setting.trainer)(plans, "3d_fullres", 0, description, CPU)
    config = trainer.config
    published = setting.backbone, setting.resolution, setting.num_queries, setting.matching
    assert (config.backbone, config.resolution, config.num_queries, config.matching) == published
    assert config.matching == "slice" and config.generator.kind == "light"
    assert config.loss == setting.loss and config.prompts == "soft"
    assert (trainer.num_epochs, trainer.gradient_clip) == (setting.epochs, 12.0)
    trainer.network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer, _ = trainer.configure_optimizers()
    assert type(optimizer).__name__ == setting.recipe.optimizer
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (1e-3, 3e-5)
        if setting.recipe.optimizer == "SGD":
            assert group["momentum"] == 0.99 and group["nesterov"]
        else:
            assert group["eps"] == 1e-4
    trainer.optimizer = optimizer
    for iteration, rate in ((0, 1e-3), (125 * setting.epochs, 1e-3 * 0.5**0.9)):  # without warm-up
        trainer.iteration = iteration
        trainer.set_learning_rate()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_published_trainer_wants_its_own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)
    with pytest.raises(ConfigError, match="MaskSAMTrainer_acdc"):
        trainers.MaskSAMTrainer_acdc(plain_plans(), "3d_fullres", 0, dataset_json(4), CPU)
