"""The module of docs/extending.md: its backbone and its adapter, registered and trained for a step."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from configs import tiny_config
from documented_world import write_module
from plain_plans import dataset_json, folders, plain_plans
from small_sam import install_small_sam

from masksam_nnunet import config as config_module
from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.modeling import BackboneSpec, MaskSAM, register_backbone
from masksam_nnunet.modeling.backbones import registry as sam_parts
from masksam_nnunet.modeling.image_encoder import AdaptedImageEncoder
from masksam_nnunet.modeling.trainable import Trainable
from masksam_nnunet.plans.architecture import open_configuration, write_config

CPU = torch.device("cpu")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's module, imported while ``vit_b`` is a small SAM; the registry is put back."""
    kept = dict(sam_parts.SPECS), dict(config_module.SAM_OF)
    install_small_sam(tmp_path / "cache", monkeypatch)
    file = write_module(tmp_path)
    monkeypatch.setenv(EXT_TRAINER, ext_trainer_value(str(file.parent)))
    spec = importlib.util.spec_from_file_location("page_of_extending", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    yield made
    for registry, content in zip((sam_parts.SPECS, config_module.SAM_OF), kept, strict=True):
        for name in set(registry) - set(content):
            del registry[name]


def test_nnunet_finds_the_trainers(module: ModuleType) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name in ("MaskSAMTrainer_resnet18", "MaskSAMTrainer_vit_b_slices", "MaskSAMTrainer_gentle"):
        assert recursive_find_trainer_class_by_name(name).__name__ == name


@pytest.mark.parametrize("trainer", ["MaskSAMTrainer_resnet18", "MaskSAMTrainer_vit_b_slices"])
def test_a_step_of_training(trainer: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the trainer, by plans that hold the config: SAM's file is read where there is one."""
    folders(tmp_path, monkeypatch)
    plans = plain_plans()
    small = replace(tiny_config(), backbone=getattr(module, trainer).backbone, patch_size=(4, 32, 32))
    write_config(plans, "3d_fullres", small)
    made = getattr(module, trainer)(plans, "3d_fullres", 0, dataset_json(), CPU)
    made.initialize()
    made._load_sam()
    made.on_train_epoch_start()
    network = made.masksam
    assert network.config.backbone == made.backbone
    assert network.sam_is_loaded == (trainer != "MaskSAMTrainer_resnet18")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}

    batch = {"data": torch.randn(2, 1, 4, 32, 32), "target": torch.randint(0, 3, (2, 1, 4, 32, 32)).float()}
    network.train()
    for _ in range(2):  # what stands before a zeroed layer has no gradient in the first
        loss = float(made.train_step(batch)["loss"])
        assert loss == loss and loss > 0
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert moved <= trained
    own = {name for name in trained if name.startswith("image_encoder.")}
    assert len(own & moved) > 0.7 * len(own)

    network.eval()
    with torch.no_grad():
        assert network(batch["data"]).exp().sum(1).allclose(torch.ones(2, 4, 32, 32), atol=1e-4)


def test_the_encoder_with_the_new_adapter_is_sam_at_first(module: ModuleType) -> None:
    plain = MaskSAM(tiny_config(backbone="vit_b"), 1, 3)
    other = MaskSAM(tiny_config(backbone="vit_b_slices"), 1, 3)
    assert isinstance(plain.image_encoder, AdaptedImageEncoder) and isinstance(other.image_encoder, AdaptedImageEncoder)
    other.image_encoder.sam.load_state_dict(plain.image_encoder.sam.state_dict())
    images = torch.randn(1, plain.grid.patch[0], 3, *plain.grid.image)
    for ours, theirs in zip(plain.image_encoder(images)[0], other.image_encoder(images)[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    adapters = [m for m in other.image_encoder.modules() if isinstance(m, module.SliceAttention)]
    assert len(adapters) == 2 * len(other.image_encoder.sam.blocks)
    assert all(isinstance(m, Trainable) and p.requires_grad for m in adapters for p in m.parameters())


def test_configs_name_registered_backbones_only(module: ModuleType) -> None:
    config = replace(tiny_config(), backbone="resnet18")
    assert MaskSAMConfig.from_json(config.to_json()) == config and config.sam is None and not config.needs_sam
    assert replace(config, backbone="vit_b_slices").sam == "vit_b"
    with pytest.raises(ConfigError, match=r"resnet99.*registers"):
        replace(config, backbone="resnet99")


def test_plans_are_read_before_any_trainer_is(module: ModuleType) -> None:
    """As masksam explain and export do."""
    plans = plain_plans()
    write_config(plans, "3d_fullres", replace(tiny_config(), backbone="resnet18", patch_size=(4, 32, 32)))
    del sam_parts.SPECS["resnet18"], config_module.SAM_OF["resnet18"]
    config = open_configuration(plans, "3d_fullres")[1]
    assert config is not None and config.backbone == "resnet18" and "resnet18" in sam_parts.SPECS


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plain_plans()
    write_config(plans, "3d_fullres", tiny_config())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["config"]["backbone"] = "elsewhere"
    (tmp_path / "broken.py").write_text("import no_such_package_anywhere")
    monkeypatch.setenv(EXT_TRAINER, str(tmp_path))
    with pytest.raises(ConfigError, match="no_such_package_anywhere"):
        open_configuration(plans, "3d_fullres")
    monkeypatch.delenv(EXT_TRAINER)
    with pytest.raises(ConfigError, match="backbone = 'elsewhere'"):
        open_configuration(plans, "3d_fullres")


@pytest.mark.parametrize(
    ("name", "spec", "what"),
    [
        ("vit_b", BackboneSpec(8), "project's own"),
        ("vit_x", BackboneSpec(8, sam="vit_x"), "never released"),
        ("cnn", BackboneSpec(8, sam="vit_b", encoder=lambda spec, grid: torch.nn.Identity()), "does not fit"),
    ],
)
def test_what_cannot_be_registered(name: str, spec: BackboneSpec, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        register_backbone(name, spec)
    assert name in ("vit_b",) or name not in config_module.SAM_OF
