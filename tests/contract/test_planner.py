"""MaskSAMPlanner against nnU-Net's planner, on a raw dataset and a fingerprint written by hand."""

from __future__ import annotations

import io
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import tiny_config
from kinds_of_data import Kind
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import folders, simple_cost
from rich.console import Console
from typer.testing import CliRunner

from masksam_nnunet.cli.app import app
from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import DataError
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans import sizing
from masksam_nnunet.plans.architecture import read_config, unet_config
from masksam_nnunet.plans.planner import MaskSAMPlanner
from masksam_nnunet.plans.planning import plan_dataset
from masksam_nnunet.plans.sizing import GENERATORS
from masksam_nnunet.trainers import MaskSAMTrainer

KIND = Kind(
    id=43,
    name="Planned",
    sizes=[(10, 48, 40)] * 6,
    labels={"background": 0, "first": 1, "second": 2},
    values=(1, 2),
    spacing=(1.0, 1.0, 4.0),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders with the dataset, its fingerprint and nnU-Net's own plans."""
    root = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        folders(root, patch)
        KIND.write(root / "nnUNet_raw")
        KIND.write_fingerprint(root / "nnUNet_preprocessed")
        ExperimentPlanner(KIND.dataset).plan_experiment()
    return root


@pytest.fixture
def preprocessed(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset's preprocessed folder, in nnU-Net's folders of each test."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(sizing, "training_cost", simple_cost)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(EXT_TRAINER, raising=False)  # a command of an earlier test in this process may have set it
    return tmp_path / "nnUNet_preprocessed" / KIND.dataset


def plan(*arguments: Any, console: Console | None = None, **options: Any) -> MaskSAMPlanner:
    """``masksam plan -d 43 --backbone tiny`` unless told otherwise."""
    return plan_dataset(
        *(arguments or ("43",)), **{"backbone": "tiny", **options}, console=console or Console(quiet=True)
    )


def stock(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "nnUNetPlans.json").read_text())  # type: ignore[no-any-return]


def test_all_but_the_network_is_nnunets_and_a_trainer_builds_it(preprocessed: Path) -> None:
    theirs = stock(preprocessed)
    (preprocessed / "nnUNetPlans.json").unlink()
    planner = plan()
    ours = planner.plans
    assert not (preprocessed / "nnUNetPlans.json").exists()
    assert set(ours["configurations"]) == set(theirs["configurations"]) == {"2d", "3d_fullres"}
    for name, configuration in theirs["configurations"].items():
        changed = {k for k, v in configuration.items() if ours["configurations"][name][k] != v}
        assert changed <= {"patch_size", "batch_size", "architecture"}
    changed = {k for k, v in theirs.items() if ours[k] != v}
    assert changed == {"plans_name", "experiment_planner_used", "configurations"}
    assert ours["plans_name"] == "MaskSAMPlans"

    manager = PlansManager(str(planner.file))
    for name in ("2d", "3d_fullres"):
        settings = manager.get_configuration(name)
        config = read_config(settings)
        assert config is not None and config.patch_size == tuple(settings.patch_size)
        network = MaskSAMTrainer.build_network_architecture(manager, settings, 1, 3, False).eval()
        with torch.no_grad():
            assert network(torch.zeros(1, 1, *settings.patch_size)).shape == (1, 3, *settings.patch_size)


def test_the_base_is_nnunets_plans_where_they_are(preprocessed: Path) -> None:
    """Spacing changed by hand, and data of another name: both methods must train on the same."""
    theirs = stock(preprocessed)
    theirs["configurations"]["3d_fullres"] |= {"spacing": [5.0, 2.0, 2.0], "data_identifier": "by_hand"}
    theirs["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [8, 24, 20]
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(theirs))
    ours = plan("43", ["3d_fullres"]).plans["configurations"]["3d_fullres"]
    assert (ours["spacing"], ours["data_identifier"]) == ([5.0, 2.0, 2.0], "by_hand")
    assert ours["patch_size"] == [8, 32, 32]


def test_decisions_have_reasons(preprocessed: Path) -> None:
    decisions = plan("43", ["3d_fullres"]).plans["masksam"]["3d_fullres"]
    rows = {row["what"]: row for row in decisions["decided"]}
    assert decisions["epochs"] == rows["epochs"]["value"] == 1000
    assert "rtx4090 (no GPU here" in rows["time"]["why"] and "nnU-Net by the same rule" in rows["time"]["why"]
    assert (rows["N"]["value"], rows["N"]["why"]) == (3, "one for each class, background too")
    assert rows["generator"]["value"] == "light"


BLOCKS = ("n_conv_per_stage", "n_blocks_per_stage")
NETWORKS = [((4.0, 1.0, 1.0), (10, 48, 40)), ((1.0, 1.0), (48, 40))]
NETWORKS += [((10.0, 1.5, 1.5), (10, 256, 216)), ((1.0, 1.0, 1.0), (36, 50, 35)), ((0.7, 0.7), (512, 512))]


@pytest.mark.usefixtures("preprocessed")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("spacing", "shape"), NETWORKS)
def test_the_unet_is_the_one_that_nnunet_plans(
    spacing: tuple[float, ...], shape: tuple[int, ...], residual: bool
) -> None:
    planner = (ResEncUNetPlanner if residual else ExperimentPlanner)(KIND.dataset)
    planned = planner.get_plans_for_configuration(np.array(spacing), np.array(shape), "data", 1e9, {})
    patch, planned = tuple(map(int, planned["patch_size"])), planned["architecture"]
    wanted, flat = planned["arch_kwargs"], len(shape) == 2
    ours = unet_config(spacing, patch, residual)
    for sizes, theirs in ((ours.kernel_sizes, wanted["kernel_sizes"]), (ours.strides, wanted["strides"])):
        assert sizes == tuple((1,) * flat + tuple(map(int, stage)) for stage in theirs)
    assert (ours.features, ours.blocks) == (wanted["features_per_stage"], tuple(wanted[BLOCKS[residual]]))

    with torch.device("meta"):
        theirs = get_network_from_plans(
            planned["network_class_name"], wanted, planned["_kw_requires_import"], 1, 3, deep_supervision=True
        )
        network = MaskSAM(tiny_config(patch_size=patch, generator=ours), 1, 3)
    unets = network.prompt_generator.decoder.unet, theirs
    sizes = [{name: p.numel() for name, p in unet.named_parameters()} for unet in unets]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("configuration", "generator"), [("2d", "unet"), ("3d_fullres", "unet"), ("3d_fullres", "resenc")]
)
def test_plans_with_a_unet(preprocessed: Path, configuration: str, generator: str) -> None:
    words = ["plan", "-d", "43", "-c", configuration, "--backbone", "tiny", "--generator", generator]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and GENERATORS[generator] in done.output
    manager = PlansManager(str(preprocessed / "MaskSAMPlans.json"))
    settings = manager.get_configuration(configuration)
    config = read_config(settings)
    assert config is not None and config.generator == unet_config(
        settings.spacing, config.patch_size, generator == "resenc"
    )
    network = MaskSAMTrainer.build_network_architecture(manager, settings, 1, 3, False).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *config.patch_size)).shape == (1, 3, *config.patch_size)


def test_few_hours_leave_few_epochs(preprocessed: Path) -> None:
    decisions = plan("43", ["3d_fullres"], hours=0.015, gpu="rtx3090").plans["masksam"]["3d_fullres"]
    assert (decisions["hours"], decisions["gpu_memory_gb"]) == (0.015, 24) and 100 <= decisions["epochs"] < 1000
    assert decisions["epochs"] % 10 == 0


def test_only_what_is_asked_for_and_nothing_else_is_lost(preprocessed: Path) -> None:
    first = plan("43", ["2d"])
    assert set(first.plans["configurations"]) == {"2d"} == set(first.plans["masksam"])
    own = deepcopy(first.plans)
    own["configurations"]["mine"] = {"inherits_from": "2d", "batch_size": 7}
    first.file.write_text(json.dumps(own))
    second = plan("43", ["3d_fullres"])
    content = json.loads(second.file.read_text())
    assert set(content["configurations"]) == {"2d", "mine", "3d_fullres"}
    assert content["masksam"]["2d"] == first.plans["masksam"]["2d"]
    assert second.planned == ["3d_fullres"]


def test_a_cascade_brings_its_two_stages(preprocessed: Path) -> None:
    theirs = stock(preprocessed)
    full = theirs["configurations"]["3d_fullres"]
    theirs["configurations"]["3d_lowres"] = deepcopy(full) | {
        "next_stage": "3d_cascade_fullres",
        "data_identifier": "nnUNetPlans_3d_lowres",
    }
    theirs["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(theirs))
    low = plan("43", ["3d_lowres"], plans_name="OnlyLow").plans["configurations"]
    assert set(low) == {"3d_lowres"} and "next_stage" not in low["3d_lowres"]
    planner = plan("43", ["3d_cascade_fullres"])
    assert set(planner.planned) == {"3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    assert planner.plans["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    config = read_config(PlansManager(planner.plans).get_configuration("3d_cascade_fullres"))
    assert config is not None and config.backbone == "tiny"


def test_plans_move_between_datasets(preprocessed: Path, tmp_path: Path) -> None:
    """Without -tp nnU-Net keeps the data identifier, and the target's own data have another spacing."""
    planner = plan("43", ["3d_fullres"])
    other = Kind(44, "Other", KIND.sizes, KIND.labels, KIND.values, spacing=(2.0, 2.0, 2.0))
    raw = other.write(tmp_path / "nnUNet_raw")
    folder = other.write_fingerprint(tmp_path / "nnUNet_preprocessed")
    ExperimentPlanner(other.dataset).plan_experiment()
    move_plans_between_datasets(43, 44, "MaskSAMPlans", "MovedPlans")
    moved, made = (PlansManager(str(file)) for file in (folder / "MovedPlans.json", planner.file))
    assert read_config(moved.get_configuration("3d_fullres")) == read_config(made.get_configuration("3d_fullres"))

    move_plans_between_datasets(43, 44, "MaskSAMPlans")
    plans = json.loads((folder / "MaskSAMPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((raw / "dataset.json").read_text())
    with pytest.raises(ConfigError, match=r"spacing"):
        MaskSAMTrainer(plans, "3d_fullres", 0, description, torch.device("cpu"))


def test_the_report_says_what_comes_next(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where patients have cases on both sides of a fold."""
    raw = tmp_path / "nnUNet_raw" / KIND.dataset
    patients = [f"patient{index // 2:03d}_frame{index % 2:02d}" for index in range(6)]
    for case, patient in zip(KIND.cases, patients, strict=True):
        (raw / "imagesTr" / f"{case}_0000.nii.gz").rename(raw / "imagesTr" / f"{patient}_0000.nii.gz")
        (raw / "labelsTr" / f"{case}.nii.gz").rename(raw / "labelsTr" / f"{patient}.nii.gz")
    console = Console(record=True, width=400, file=io.StringIO())
    plan("43", ["3d_fullres"], console=console)
    text = console.export_text()
    assert "warning: patients" in text and "masksam split -d 43" in text and "--gpu cpu" in text
    assert "nnUNetv2_preprocess -d 43 -plans_name MaskSAMPlans -c 3d_fullres" in text
    assert "nnUNetv2_train 43 3d_fullres 0 -p MaskSAMPlans -tr MaskSAMTrainer_tiny" in text
    (preprocessed / "nnUNetPlans_3d_fullres").mkdir()
    for patient in patients:
        (preprocessed / "nnUNetPlans_3d_fullres" / f"{patient}.b2nd").touch()
    console = Console(record=True, width=200, file=io.StringIO())
    plan("43", ["3d_fullres"], console=console, gpu="cpu")
    text = console.export_text()
    assert "No preprocessing is needed" in text and "MaskSAMTrainer_tiny -device cpu" in text and "--gpu" not in text
    console = Console(record=True, width=200, file=io.StringIO())
    plan("43", ["3d_fullres"], console=console, gpu="cpu", hours=0.001)
    assert "warning: 3d_fullres: a fold takes about" in console.export_text()


def test_plans_that_are_not_masksams_are_never_overwritten(preprocessed: Path) -> None:
    (preprocessed / "Mine.json").write_text(json.dumps(stock(preprocessed) | {"plans_name": "Mine"}))
    with pytest.raises(DataError, match="--plans-name Mine"):
        plan(plans_name="Mine")
    (preprocessed / "MaskSAMPlans.json").write_text("{")
    with pytest.raises(DataError, match=r"MaskSAMPlans\.json"):
        plan()
    earlier = plan(plans_name="Earlier")
    config = earlier.plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["config"]
    config["generator_widths"] = config.pop("generator")
    earlier.file.write_text(json.dumps(earlier.plans))
    with pytest.raises(DataError, match=r"Earlier\.json .*generator_widths.*; remove it and plan again"):
        plan("43", ["3d_fullres"], plans_name="Earlier")


def test_different_folds_in_raw_and_preprocessed(preprocessed: Path, tmp_path: Path) -> None:
    folds = [{"train": KIND.cases[:3], "val": KIND.cases[3:]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(folds))
    folds[0]["val"] = KIND.cases[4:]
    (tmp_path / "nnUNet_raw" / KIND.dataset / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(DataError, match=r"splits_final\.json"):
        plan()
    more = [*folds, {"train": KIND.cases[1:], "val": KIND.cases[:1]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(more))
    plan()  # nnU-Net takes further folds there


def test_the_command(preprocessed: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "-d", "43", "-c", "2d", "3d_fullres", "--backbone", "tiny"])
    assert done.exit_code == 0, done.output
    assert "Dataset043_Planned, MaskSAMPlans, 2d" in done.output and "masksam env" in done.output
    wrong = CliRunner().invoke(app, ["plan", "-d", "43", "-c", "3d_lowres", "--backbone", "tiny"])
    assert wrong.exit_code == 1 and "error: -c 3d_lowres" in wrong.stderr
    assert CliRunner().invoke(app, ["plan", "-d", "43", "2d"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("99",), {}, r"-d 99: .* Dataset043_Planned"),
        (("Dataset043_Plan",), {}, "-d Dataset043_Plan"),
        (("43", ["3d_lowres"]), {}, "-c 3d_lowres: .* 2d, 3d_fullres"),
        (("43",), {"gpu_memory_gb": 0.0}, "--gpu-memory 0"),
        (("43",), {"gpu_memory_gb": float("nan")}, "--gpu-memory nan"),
        (("43",), {"hours": -1.0}, "--hours -1"),
        (("43",), {"gpu": "riva128"}, "--gpu riva128: .* rtx4090"),
        (("43",), {"plans_name": "nnUNetPlans"}, "--plans-name 'nnUNetPlans'"),
        (("43",), {"plans_name": "a/b"}, "--plans-name 'a/b'"),
        (("43",), {"preset": "acdc"}, "--backbone tiny: --preset acdc .* vit_b"),
        (("43",), {"preset": "acdc", "backbone": "auto", "generator": "unet"}, "--generator unet: --preset acdc"),
        (("43",), {"preset": "acdc", "backbone": "auto"}, "--preset acdc .* 2 labels"),
    ],
)
def test_bad_requests_write_nothing(
    preprocessed: Path, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    before = sorted(preprocessed.iterdir())
    with pytest.raises(DataError, match=message):
        plan(*arguments, **options)
    assert sorted(preprocessed.iterdir()) == before
