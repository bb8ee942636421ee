"""The module in docs/extending.md: its backbone and its adapter are registered and trained for a step."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from configs import tiny_config
from documented import PAGES, blocks
from plain_plans import dataset_json, folders, plain_plans
from small_sam import install_small_sam

from masksam_nnunet.backbones import BACKBONES, Backbone, register_backbone
from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans.architecture import open_configuration, write_config

PAGE = "docs/extending.md"
FILE = Path("my_trainers/my_masksam.py")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's module, imported while ``vit_b`` is a small SAM; the registry is restored."""
    kept = set(BACKBONES)
    install_small_sam(tmp_path / "cache", monkeypatch)
    assert f"`{FILE}`" in PAGES[PAGE]
    file = tmp_path / FILE
    file.parent.mkdir()
    file.write_text("\n\n".join(blocks(PAGE, "python")), encoding="utf-8")
    monkeypatch.setenv(EXT_TRAINER, ext_trainer_value(str(file.parent)))
    spec = importlib.util.spec_from_file_location("page_of_extending", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    yield made
    for name in set(BACKBONES) - kept:
        del BACKBONES[name]


def test_nnunet_finds_the_trainers(module: ModuleType) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    own = "resnet18", "vit_b_slices", "gentle", "no_mirroring"
    for name in (f"MaskSAMTrainer_{name}" for name in own):
        assert recursive_find_trainer_class_by_name(name).__name__ == name


def test_nnunets_trainer_without_mirroring_combines(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path, monkeypatch)
    plans = plain_plans()
    write_config(plans, "3d_fullres", replace(tiny_config(), patch_size=(4, 32, 32)))
    plain, combined = (
        cls(deepcopy(plans), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
        for cls in (module.MaskSAMTrainer, module.MaskSAMTrainer_no_mirroring)
    )
    mirrored = [x.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] for x in (plain, combined)]
    assert mirrored == [(0, 1, 2), None] and combined.inference_allowed_mirroring_axes is None
    assert combined.config == plain.config


@pytest.mark.parametrize("trainer", ["MaskSAMTrainer_resnet18", "MaskSAMTrainer_vit_b_slices"])
def test_two_training_steps(trainer: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    plans = plain_plans()
    small = replace(tiny_config(), backbone=getattr(module, trainer).backbone, patch_size=(4, 32, 32))
    write_config(plans, "3d_fullres", small)
    made = getattr(module, trainer)(plans, "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    made.initialize()
    made._load_sam()
    made.on_train_epoch_start()
    network = made.sam_network
    assert network.sam_is_loaded == (trainer == "MaskSAMTrainer_vit_b_slices")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}

    batch = {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32)).float()}
    network.train()
    for _ in range(2):  # in the first step nothing before a zeroed layer has a gradient
        assert float(made.train_step(batch)["loss"]) > 0
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert moved <= trained
    encoder = {name for name in trained if name.startswith("image_encoder.")}
    assert len(encoder & moved) > 0.7 * len(encoder)

    network.eval()
    with torch.no_grad():
        assert network(batch["data"]).exp().sum(1).allclose(torch.ones(2, 4, 32, 32), atol=1e-4)


def test_the_encoder_with_the_new_adapter_equals_sam_at_step_0(module: ModuleType) -> None:
    plain, other = (MaskSAM(tiny_config(backbone=name), 1, 3) for name in ("vit_b", "vit_b_slices"))
    other.image_encoder.load_state_dict(plain.image_encoder.state_dict(), strict=False)
    images = torch.randn(1, plain.grid.patch[0], 3, *plain.grid.image)
    for ours, theirs in zip(plain.image_encoder(images)[0], other.image_encoder(images)[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(isinstance(part, module.SliceAttention) for part in other.image_encoder.modules())


def test_an_own_adapter_fits_every_sam(module: ModuleType) -> None:
    register_backbone(replace(BACKBONES["lite_medsam"], name="lite_medsam_slices", adapter=module.SliceAttention))
    network = MaskSAM(replace(tiny_config(), backbone="lite_medsam_slices"), 1, 3)
    assert any(isinstance(part, module.SliceAttention) for part in network.image_encoder.modules())


def test_plans_import_the_module_of_an_own_backbone(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """masksam explain and export read plans first. A module that fails to import is named."""
    plans = plain_plans()
    write_config(plans, "3d_fullres", replace(tiny_config(), backbone="resnet18", patch_size=(4, 32, 32)))
    del BACKBONES["resnet18"]
    config = open_configuration(plans, "3d_fullres")[1]
    assert config is not None and config.backbone == "resnet18" and "resnet18" in BACKBONES
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["config"]["backbone"] = "elsewhere"
    with pytest.raises(ConfigError, match="elsewhere"):
        open_configuration(plans, "3d_fullres")
    (tmp_path / "broken.py").write_text("import no_such_package_anywhere")
    monkeypatch.setenv(EXT_TRAINER, str(tmp_path))
    with pytest.raises(ConfigError, match="no_such_package_anywhere"):
        open_configuration(plans, "3d_fullres")


def test_contradictory_backbones_are_refused() -> None:
    before = dict(BACKBONES)
    checkpoint = BACKBONES["vit_b"].checkpoint
    for backbone in (
        Backbone("vit_b", 8),
        Backbone("cnn", 8, checkpoint=checkpoint, encoder=lambda *_: torch.nn.Identity()),
    ):
        with pytest.raises(ValueError, match=backbone.name):
            register_backbone(backbone)
    assert before == BACKBONES
