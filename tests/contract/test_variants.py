"""The variants of benchmarks/learning: each trains, and some of their changes are seen. Takes minutes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_plans import DATASET, batch, dataset_json, folders, plain_plans, simple_cost

from masksam_nnunet.environment import BUDGET_ITERATIONS, RANDOM_INIT
from masksam_nnunet.files import write_json
from masksam_nnunet.plans import architecture
from masksam_nnunet.trainers import MaskSAMTrainer_lite_medsam_budget

pytestmark = pytest.mark.long
PATCH = (2, 32, 32)


def test_every_variant_of_masksam_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "learning")
    variants: Any = importlib.import_module("variants")
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)
    monkeypatch.setenv(BUDGET_ITERATIONS, "2")
    monkeypatch.setenv(RANDOM_INIT, "1")
    setting = variants.Setting(DATASET, PATCH, 1)
    write_json(setting.folder / "nnUNetPlans.json", plain_plans(PATCH))
    write_json(setting.folder / "dataset.json", dataset_json())
    trained, gains = {}, {}
    for name, variant in variants.VARIANTS.items():
        if variant.trainer != variants.MASKSAM:
            continue
        plans = variants.plans_for(setting, name, variant, 1)
        made = MaskSAMTrainer_lite_medsam_budget(plans, "3d_fullres", 0, dataset_json(), torch.device("cpu"))
        made.initialize()
        made.on_train_epoch_start()
        for attribute, value in variant.settings.items():
            setattr(made, attribute, value)
        variant.prepare(made)
        given = batch(made)
        before = [(p, p.detach().clone()) for p in made.sam_network.parameters() if p.requires_grad]
        for _ in range(2):
            assert torch.isfinite(made.train_step(given)["loss"]), name
        changed = sum(not torch.equal(parameter, start) for parameter, start in before)
        assert changed > len(before) / 4, name  # some layers wait for gains that are zero at first
        trained[name] = len(before)
        gains[name] = made.sam_network.mask_head.gain
        if name == "light_flat":
            layers = [x for x in made.sam_network.prompt_generator.modules() if isinstance(x, torch.nn.Conv3d)]
            sides = [layer.weight[:, :, ::2] for layer in layers if layer.kernel_size[0] == 3]
            assert sides and not any(side.any() for side in sides)
    assert gains["light"].any() and not gains["light_without_gain"].any()
    assert trained["light_late_adapters"] < trained["light"] < trained["light_norms"] < trained["light_from_scratch"]
