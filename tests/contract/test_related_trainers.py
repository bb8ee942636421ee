"""The trainers of the related methods against nnU-Net's API, without data."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import DATASET, batch, dataset_json, folders, plain_plans, region_dataset_json, simple_cost, tiny_plans
from small_sam import install_small_sam

from masksam_nnunet import trainers
from masksam_nnunet.config import UNetConfig
from masksam_nnunet.environment import trainer_folder
from masksam_nnunet.errors import ModelError
from masksam_nnunet.inference.explain import run
from masksam_nnunet.inference.models import TrainedModel, network_to_predict
from masksam_nnunet.method import MASKSAM, methods
from masksam_nnunet.plans import architecture
from masksam_nnunet.trainers import MaskSAMTrainer

CPU = torch.device("cpu")
NAMES = [method.trainer for method in methods().values() if method.name != MASKSAM]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)
    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    monkeypatch.setenv("MASKSAM_BUDGET_ITERATIONS", "10")


def make(name: str, description: dict[str, Any] | None = None, **plans: Any) -> MaskSAMTrainer:
    cls = getattr(trainers, name)
    made: MaskSAMTrainer = cls(tiny_plans(**plans), "3d_fullres", 0, description or dataset_json(), CPU)
    made.initialize()
    made.on_train_epoch_start()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_learns_and_its_plans_rebuild_the_network(name: str) -> None:
    made = make(name, region_dataset_json(ignore=True), form={"regions": True})
    before = [p.detach().clone() for p in made.network.parameters() if p.requires_grad]
    made.set_learning_rate()
    outputs = [made.train_step(batch(made)) for _ in range(2)]
    after = [p for p in made.network.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in after), "DDP would wait for the others"
    assert all(torch.isfinite(o["loss"]) for o in outputs)
    assert any((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True))
    made.on_train_epoch_end(outputs)
    plans = PlansManager(json.loads(json.dumps(made.plans_manager.plans)))
    again = network_to_predict(plans, "3d_fullres", made.dataset_json, name)
    again.load_state_dict(made.network.state_dict())
    x = torch.randn(1, 1, 4, 32, 32)
    torch.testing.assert_close(again.eval()(x), made.network.eval()(x))


def test_plans_of_masksam_give_all_methods_the_same_patch_resolution_and_backbone() -> None:
    for name in NAMES:
        for plans in (plain_plans((2, 32, 32), batch_size=1), tiny_plans()):
            made = getattr(trainers, name)(plans, "3d_fullres", 0, dataset_json(), CPU)
            own = MaskSAMTrainer(dict(tiny_plans()), "3d_fullres", 0, dataset_json(), CPU)
            if plans["configurations"]["3d_fullres"]["batch_size"] == 1:
                assert made.config.backbone == "vit_b"
                continue
            shared = ("backbone", "patch_size", "resolution", "intensity_ranges", "checkpointing")
            assert all(getattr(made.config, key) == getattr(own.config, key) for key in shared)
            assert isinstance(made.config.generator, UNetConfig) == methods()[made.config.method].unet


def test_on_resenc_plans_the_unet_is_theirs() -> None:
    plans = plain_plans((2, 32, 32))
    architecture_of = plans["configurations"]["3d_fullres"]["architecture"]
    for kind, residual in (("PlainConvUNet", False), ("ResidualEncoderUNet", True)):
        architecture_of["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{kind}"
        made = trainers.NnSAMTrainer(deepcopy(plans), "3d_fullres", 0, dataset_json(), CPU)  # type: ignore[attr-defined]
        assert isinstance(made.config.generator, UNetConfig) and made.config.generator.residual == residual


def test_recipes_of_the_authors_and_of_short_trainings() -> None:
    made = make("SAMedTrainer_author")
    assert (made.initial_lr, made.weight_decay, made.warmup_iterations) == (5e-3, 0.1, 250)
    loss = made.criterion.semantic_loss
    assert (loss.weight_ce, loss.weight_dice) == (0.2, 0.8)  # type: ignore[union-attr]
    assert type(make("AutoSAMTrainer_author").optimizer) is torch.optim.Adam
    assert type(make("NnSAMTrainer_author").optimizer) is torch.optim.SGD
    for name in NAMES:
        made = make(f"{name}_author")
        assert made.epochs is None and make(name).num_epochs == 1000
        made.set_learning_rate()
        assert all(torch.isfinite(made.train_step(batch(made))["loss"]) for _ in range(2)), name
    common, own = make("MASAMTrainer"), make("MASAMTrainer_author")
    for trainer in (common, own):
        trainer.iteration = 125000
        trainer.set_learning_rate()
    rates = [trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr for trainer in (common, own)]
    assert rates == pytest.approx([0.5**0.9, 0.5**7])
    assert make("SAMedTrainer_budget").budget == 10  # type: ignore[attr-defined]
    for name, rate in (("SAMedTrainer", 2e-3), ("DBSAMTrainer", 5e-4)):
        cls = getattr(trainers, f"{name}_budget")
        frozen = cls(tiny_plans(form={"backbone": "lite_medsam"}), "3d_fullres", 0, dataset_json(), CPU)
        assert (frozen.initial_lr, frozen.warmup_iterations) == (rate, 30)


def test_lean_checkpoints_keep_what_is_trained_of_sam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_small_sam(tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("MASKSAM_LEAN_CHECKPOINTS", "1")
    for name in ("SAMedTrainer", "AutoSAMTrainer_linear", "NnSAMTrainer"):
        made = make(name, form={"backbone": "vit_b"})
        made._load_sam()
        state = dict(made.network_weights())
        assert not any(key.endswith("blocks.0.attn.qkv.weight") for key in state), name
        kept = any(key.startswith("mask_decoder.output_upscaling") for key in state)
        assert kept == (name != "NnSAMTrainer")
        other = make(name, form={"backbone": "vit_b"})
        other.network.load_state_dict(state)
        x = torch.randn(1, 1, 4, 32, 32)
        torch.testing.assert_close(other.network.eval()(x), made.network.eval()(x))


def test_a_model_without_queries_is_not_explained(tmp_path: Path) -> None:
    folder = tmp_path / "nnUNet_results" / DATASET / "SAMedTrainer__nnUNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(make("SAMedTrainer").plans_manager.plans))
    with pytest.raises(ModelError, match="samed"):
        run._config(TrainedModel(folder, (0,)))
