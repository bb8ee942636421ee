"""The trainer against nnU-Net's API, without data."""

from __future__ import annotations

import inspect
import json
import os
import re
import threading
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from configs import PAPER, UNET
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import batch, dataset_json, folders, plain_plans, region_dataset_json, simple_cost, tiny_plans

from masksam_nnunet import files, trainers
from masksam_nnunet.config import ConfigError, LossConfig, UNetConfig
from masksam_nnunet.environment import RANDOM_INIT, trainer_folder
from masksam_nnunet.errors import TrainingError, WeightsError
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans import architecture
from masksam_nnunet.plans.architecture import DECISIONS, EPOCHS, NETWORK_CLASS, read_config, write_config
from masksam_nnunet.trainers import MaskSAMTrainer, MaskSAMTrainer_tiny, MaskSAMTrainer_vit_h, loading
from masksam_nnunet.trainers.resumable import ResumableTrainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)


def trainer(
    plans: dict[str, Any] | None = None,
    description: dict[str, Any] | None = None,
    cls: type[MaskSAMTrainer] = MaskSAMTrainer_tiny,
) -> MaskSAMTrainer:
    made = cls(plans or tiny_plans(), "3d_fullres", 0, description or dataset_json(), CPU)
    made.initialize()
    made.on_train_epoch_start()
    return made


def test_signatures_and_overridden_hooks_are_nnunets() -> None:
    for name in ("__init__", "build_network_architecture", "train_step", "save_checkpoint", "on_train_start"):
        ours, theirs = getattr(MaskSAMTrainer, name), getattr(nnUNetTrainer, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert isinstance(inspect.getattr_static(MaskSAMTrainer, "build_network_architecture"), staticmethod)
    own = {
        "sam_network",
        "progress",
        "set_learning_rate",
        "set_recipe",
        "make_optimizer",
        "fused",
        "guard",
        "_load_sam",
    }
    own |= {"_iterations_left", "_tell_hours", "_store_frozen"}
    own |= {name for name in vars(ResumableTrainer) if name.startswith("_")}
    own |= {"run_epoch", "on_loop_start", "training_goes_on", "epoch_goes_on", "validation_goes_on", "trouble", "save"}
    own |= {"bare_network", "network_weights", "own_state", "load_own_state", "own_seconds"}
    own |= {"training_stats", "write_beside_checkpoints"}
    for name, value in [*vars(ResumableTrainer).items(), *vars(MaskSAMTrainer).items()]:
        if (callable(value) or isinstance(value, property | staticmethod)) and not name.startswith("__"):
            assert name in own or hasattr(nnUNetTrainer, name), f"nnU-Net no longer calls {name}"


def test_too_little_shared_memory_is_told_before_workers_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, room = trainer(), SimpleNamespace(free=10**5)
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(nnUNetTrainer, "get_dataloaders", lambda self: ("train", "validation"))
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: room)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    with pytest.raises(TrainingError, match="--shm-size"):
        made.get_dataloaders()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert made.get_dataloaders() == ("train", "validation")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    room.free = 10**9
    assert made.get_dataloaders() == ("train", "validation")


def test_a_split_that_another_fold_is_writing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = trainer(), tmp_path / "splits_final.json"
    made.preprocessed_dataset_folder_base = str(tmp_path)
    monkeypatch.setattr(nnUNetTrainer, "do_split", lambda self: tuple(json.loads(file.read_text())))
    file.write_text('["tra')
    writer = threading.Timer(1.0, file.write_text, ['["train", "val"]'])
    writer.start()
    assert made.do_split() == ("train", "val")
    writer.join()
    monkeypatch.setattr(files, "WRITTEN_SECONDS", 0.0)
    for spoil in (lambda: file.write_text("["), file.unlink):
        spoil()
        with pytest.raises(TrainingError, match=re.escape(str(file))):
            made.do_split()


def test_nnunet_finds_the_installed_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    assert {"MaskSAMTrainer", "MaskSAMTrainer_acdc", "nnUNetTrainer_budget"} < set(trainers.__all__)
    for name in trainers.__all__:
        assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)


def test_backbones_and_epochs() -> None:
    assert (MaskSAMTrainer.backbone, MaskSAMTrainer_vit_h.backbone) == (None, "vit_h")
    plans = plain_plans((2, 32, 32), batch_size=1)
    assert MaskSAMTrainer(plans, "3d_fullres", 0, dataset_json(), CPU).config.backbone == "vit_b"
    assert trainers.MaskSAMTrainer_vit_l.backbone == "vit_l"
    for name, backbone in (("medsam", "medsam_vit_b"), ("mobile_sam", "mobile_sam"), ("lite_medsam", "lite_medsam")):
        make, small = getattr(trainers, f"MaskSAMTrainer_{name}"), plain_plans((2, 32, 32), batch_size=1)
        assert make(small, "3d_fullres", 0, dataset_json(), CPU).config.backbone == backbone
    assert trainer().num_epochs == 1000 and trainer().num_iterations_per_epoch == 250
    assert trainer(cls=trainers.MaskSAMTrainer_tiny_5epochs).num_epochs == 5
    plans = tiny_plans() | {DECISIONS: {"3d_fullres": {EPOCHS: 620}}}
    assert trainer(dict(plans)).num_epochs == 620, "the planned hours allow no more"
    assert trainer(plans, cls=trainers.MaskSAMTrainer_tiny_5epochs).num_epochs == 5


def test_the_log_says_how_long_a_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, lines = trainer(), []
    monkeypatch.setattr(made, "print_to_log_file", lines.append)
    made.iteration = 1000  # resumed
    made.on_loop_start()
    assert "249000 of them" in lines[0] and "hours" in lines[0] and "corrected after 50" in lines[0]
    for _ in range(60):
        made.iteration += 1
        made._tell_hours()
    assert len(lines) == 2 and "the 248945 left" in lines[1]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**34))
    for held, count in ((2**34, 3), (2**20, 5)):  # bytes of this process
        taken = SimpleNamespace(memory_info=lambda held=held: SimpleNamespace(rss=held))
        monkeypatch.setattr("psutil.Process", lambda taken=taken: taken)
        made.on_loop_start()
        assert len(lines) == count
    assert lines[4].startswith("WARNING") and "0.00195 GiB" in lines[4]
    made.tells_hours = False
    made.on_loop_start()
    assert len(lines) == 5


def test_the_config_is_derived_saved_in_the_plans_and_read_back() -> None:
    plans = plain_plans()
    made = trainer(plans)
    architecture = made.plans_manager.plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"] == NETWORK_CLASS
    assert architecture["_kw_requires_import"] == [] and architecture["arch_kwargs"]["strides"] == [[1] * 3, [2] * 3]
    again = read_config(PlansManager(json.loads(json.dumps(plans))).get_configuration("3d_fullres"))
    assert again == made.config == trainer(plain_plans()).config
    assert made.my_init_kwargs["plans"]["configurations"]["3d_fullres"]["architecture"] == architecture


def test_plans_that_name_a_network() -> None:
    plans = plain_plans()
    config = trainer(plans).config
    plans["continue_training"] = False
    made = MaskSAMTrainer(deepcopy(plans), "3d_fullres", 0, dataset_json(), CPU)
    assert (made.config.backbone, made.initial_lr) == ("tiny", 3e-3), "the plain trainer trains it, at its rate"
    with pytest.raises(ConfigError, match=r"'tiny'.*MaskSAMTrainer_vit_h"):
        MaskSAMTrainer_vit_h(deepcopy(plans), "3d_fullres", 0, dataset_json(), CPU)
    for option, value in (("patch_size", (32, 32)), ("regions", True)):
        write_config(plans, "3d_fullres", replace(config, **{option: value}))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=option):
            trainer(deepcopy(plans))


def test_warm_up_and_polynomial_decay() -> None:
    """The warm-up is at most a tenth of a training: a short one must reach its learning rate too."""
    for cls, warmup, iterations in ((MaskSAMTrainer_tiny, 30, 250_000), (trainers.MaskSAMTrainer_tiny_1epoch, 25, 250)):
        made = trainer(cls=cls)
        for iteration in (0, 10, 24, 40, iterations // 2, iterations):
            made.iteration = iteration
            made.set_learning_rate()
            warm = min(1, (iteration + 1) / warmup)
            expected = 3e-3 * warm * (1 - iteration / iterations) ** 0.9
            assert [g["lr"] for g in made.optimizer.param_groups] == pytest.approx([expected] * 2)


def test_without_sam_training_stops_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(RANDOM_INIT, raising=False)
    made = trainer(plain_plans((2, 32, 32), batch_size=1), cls=MaskSAMTrainer)
    with pytest.raises(WeightsError, match="masksam weights sam_vit_b"):
        made.on_train_start()
    monkeypatch.setenv(RANDOM_INIT, "maybe")
    with pytest.raises(ConfigError, match="MASKSAM_RANDOM_INIT = 'maybe'"):
        made._load_sam()


def test_a_card_that_pytorch_is_not_built_for_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masksam_nnunet.trainers.masksam.gpu_trouble", lambda: "Tesla V100")
    with pytest.raises(ConfigError, match="Tesla V100"):
        MaskSAMTrainer_tiny(tiny_plans(), "3d_fullres", 0, dataset_json(), torch.device("cuda"))


def test_a_cpu_takes_no_frozen_weights_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_FROZEN_BFLOAT16", "1")
    with pytest.raises(ConfigError, match="MASKSAM_FROZEN_BFLOAT16"):
        trainer().on_train_start()


def test_a_cascades_second_stage_overrides_its_parents_architecture() -> None:
    plans = plain_plans()
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    made = MaskSAMTrainer_tiny(plans, "3d_cascade_fullres", 0, dataset_json(), CPU)
    network = made.build_network_architecture(made.plans_manager, made.configuration_manager, 3, 3)
    assert isinstance(network, MaskSAM)
    assert network.in_channels == 3 and network.stem.image_channels == 1
    assert "masksam" not in plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"]


def test_plain_plans_cannot_be_predicted_from() -> None:
    manager = PlansManager(plain_plans())
    with pytest.raises(ConfigError, match="PlainConvUNet, no MaskSAM config"):
        MaskSAMTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 2)


REGIONS = {"form": {"regions": True}}
FLAT = {"generator": UNetConfig((4, 8), ((1, 3, 3),) * 2, ((1, 1, 1), (1, 2, 2)), (1, 1), residual=True)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3d": ({}, dataset_json()),
    "2d": ({"patch": (32, 48)}, dataset_json()),
    "four channels": ({"channels": 4}, dataset_json(channels=4)),
    "one slice": ({"patch": (1, 32, 32)}, dataset_json()),
    "small": ({"patch": (3, 8, 12)}, dataset_json()),
    "ignore": ({}, dataset_json(ignore=True)),
    "regions": (REGIONS, region_dataset_json()),
    "regions and ignore": (REGIONS, region_dataset_json(ignore=True)),
    "one foreground class": ({}, dataset_json(2)),
    "120 labels": ({}, dataset_json(121)),
    "the paper's form": ({"form": PAPER}, dataset_json()),
    "maps without a loss": ({"form": {"loss": LossConfig(generator=0.0)}}, dataset_json()),
    "no loss on the output": ({"form": {"loss": LossConfig(semantic=0.0)}}, dataset_json()),
    "a U-Net": ({"form": {"generator": UNET}}, dataset_json()),
    "a U-Net, maps without a loss": ({"form": {"generator": UNET, "loss": LossConfig(generator=0.0)}}, dataset_json()),
    "a U-Net, 2d, four channels": ({"patch": (32, 48), "channels": 4, "form": FLAT}, dataset_json(channels=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_and_validation(case: str) -> None:
    kwargs, description = deepcopy(CASES[case])
    made = trainer(tiny_plans(**kwargs), description)
    before = {n: p.detach().clone() for n, p in made.network.named_parameters()}
    first = made.train_step(batch(made))
    assert all((p.grad is not None) == p.requires_grad for p in made.network.parameters()), "DDP would wait for it"
    second = made.train_step(batch(made, empty=True))
    assert all(torch.isfinite(v) for outputs in (first, second) for v in outputs.values()), (first, second)
    assert {"loss", "class", "mask_bce", "aux_dice", "box_giou"} <= set(first)
    assert any(not torch.equal(p, before[n]) for n, p in made.network.named_parameters())
    seen: dict[str, float] = {}
    made.logger.loggers.append(SimpleNamespace(log=lambda key, value, step: seen.update({key: value})))
    made.on_train_epoch_end([first, second])
    assert {"train_losses/mask_dice", "train_losses/class"} <= set(seen)
    dense, judged = made.config.anchored, made.config.loss.semantic > 0
    assert ("train_losses/semantic" in seen) == judged
    assert ("train_losses/generator" in seen) == (dense and made.config.loss.generator > 0)
    assert ("sam_decoder/gain" in seen) == dense and ("sam_decoder/dice_change" in seen) == (dense and judged)
    log = Path(made.log_file).read_text()
    assert "loss terms" in log
    assert bool(re.search(r"SAM's decoder: gain 0\.0\d+ \(largest 0\.\d+\)", log)) == dense
    assert bool(re.search(r"SAM's decoder: .*; .* Dice .* by [+-]0\.\d+", log)) == (dense and judged)
    made.logger.loggers = []
    made.on_validation_epoch_start()
    with torch.no_grad():
        outputs = made.validation_step(batch(made))
    assert np.isfinite(outputs["loss"])
    heads = made.label_manager.num_segmentation_heads
    assert len(outputs["tp_hard"]) == (heads if made.label_manager.has_regions else heads - 1)


def test_only_what_is_new_is_trained_and_sam_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANDOM_INIT, "1")
    made = trainer(plain_plans((2, 32, 32), batch_size=1), cls=MaskSAMTrainer)
    sam = {name: value.clone() for name, value in made.sam_network.sam_tensors().items()}
    optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in made.network.parameters() if p.requires_grad}
    for _ in range(2):
        made.train_step(batch(made))
    for name, parameter in made.network.named_parameters():
        if name in sam:
            assert not parameter.requires_grad and torch.equal(parameter, sam[name]), name


@pytest.mark.parametrize("form", [{}, {"generator": UNET}])
def test_checkpoints_bring_sam_and_serve_as_pretrained_weights(
    form: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tiny_plans(form=form))
    made.train_step(batch(made))
    file = tmp_path / "checkpoint.pth"
    made.local_rank = 1
    made.save_checkpoint(str(file))
    assert not file.exists(), "rank 0 writes"
    made.local_rank = 0
    made.save_checkpoint(str(file))
    other = trainer(tiny_plans(form=form))
    other.load_checkpoint(str(file))
    assert other.sam_network.sam_is_loaded
    for a, b in zip(made.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("masksam_nnunet.trainers.masksam.find", lambda backbone: pytest.fail("SAM was looked for"))
    other._load_sam()
    fewer = trainer(
        tiny_plans(form=form), dataset_json(2)
    ).network  # -pretrained_weights, with another number of classes
    load_pretrained_weights(fewer, str(file))
    name = "mask_head.convs.convs.0.conv.weight"
    assert torch.equal(fewer.get_parameter(name), made.network.get_parameter(name))


def test_another_config_in_the_results_folder_is_refused() -> None:
    made = trainer()
    Path(made.output_folder_base, "plans.json").write_text(json.dumps(made.plans_manager.plans))
    Path(made.output_folder, "checkpoint_final.pth").touch()
    trainer()  # the same config may go on
    with pytest.raises(ConfigError, match="num_queries: 1 there, 9 now"):
        plans = plain_plans()
        write_config(plans, "3d_fullres", replace(made.config, num_queries=9))
        trainer(plans)


def test_what_an_earlier_version_left_is_refused() -> None:
    """Its plans, its results folder, and its checkpoint: the message says what to do."""
    made = trainer()
    earlier = tiny_plans(form=PAPER)
    config = earlier["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["config"]
    for option in ("generator", "matching", "encoder_adapters"):
        del config[option]
    del config["loss"]["generator"]
    for change in ({}, {"generator_widths": [16, 8, 8]}, {"loss": config["loss"] | {"matching": "slice"}}):
        config.update(change)
        with pytest.raises(ConfigError, match="another version of masksam-nnunet: plan again, or"):
            trainer(deepcopy(earlier))
    Path(made.output_folder_base, "plans.json").write_text(json.dumps(earlier))
    made.save_checkpoint(str(Path(made.output_folder, "checkpoint_final.pth")))
    with pytest.raises(ConfigError, match=r"matching.* Move the folder away, or plan under another name"):
        trainer()

    state = made.network.state_dict()
    line = made.config.architecture.replace("matching=class ", "").replace("light:", "")
    state["architecture"] = torch.tensor(list(line.encode().ljust(512, b"\0")))
    with pytest.raises(WeightsError, match=r"it is for backbone=tiny .*generator=16-8-8 .* Use the plans"):
        made.network.load_state_dict(state)


def test_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setenv("MASKSAM_SLICES_AT_ONCE", "2")
    made = trainer()
    assert made.sam_network.image_encoder.slices_at_once == 2
    made.device = torch.device("cuda")
    assert not made._do_i_compile()
    monkeypatch.setenv("nnUNet_compile", "1")
    assert made._do_i_compile() == (os.name != "nt")
    made.device = torch.device("cpu")
    assert made._do_i_compile()
    monkeypatch.setenv("MASKSAM_SLICES_AT_ONCE", "0")
    with pytest.raises(ConfigError, match="MASKSAM_SLICES_AT_ONCE = '0'"):
        trainer()
