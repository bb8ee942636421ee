"""Which methods and folds a benchmark trains, and what must hold before."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split
from plain_plans import dataset_json, plain_plans

from masksam_nnunet.benchmarks.fold_record import FoldRecord, Inputs
from masksam_nnunet.benchmarks.fold_state import Stage, fold_state
from masksam_nnunet.benchmarks.grid import Grid, check_grid, find_benchmark_dataset, grid_jobs
from masksam_nnunet.benchmarks.local_jobs import device_kind
from masksam_nnunet.benchmarks.locks import locked
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.errors import BenchmarkError, UsageError
from masksam_nnunet.inference import methods as methods_module
from masksam_nnunet.inference.methods import parse_methods

DATASET = "Dataset004_Small"
CASES = [f"case_{n:03d}" for n in range(10)]
STOCK = Method("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
BUDGET = Method("nnUNetTrainer_budget", "nnUNetPlans", "3d_fullres")


def place_dataset(root: Path, monkeypatch: pytest.MonkeyPatch, cases: list[str]) -> Path:
    """A planned and preprocessed dataset of empty files; returns its folder in nnUNet_preprocessed."""
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    description = dataset_json() | {"file_ending": ".nii.gz", "numTraining": len(cases)}
    plans = plain_plans() | {"dataset_name": DATASET}
    data = preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
    for folder in (raw / "imagesTr", raw / "labelsTr", data):
        folder.mkdir(parents=True)
    channels = len(description["channel_names"])
    for case in cases:
        for channel in range(channels):
            (raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"{case}{ending}").touch()
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return preprocessed


@pytest.fixture()
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_dataset(tmp_path, monkeypatch, CASES)


def grid(*methods: Method, **changes: object) -> Grid:
    made = Grid(DATASET, "3d_fullres", methods or (STOCK,), (0, 1, 2, 3, 4), device="cpu")
    return replace(made, **changes)  # type: ignore[arg-type]


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture()
def any_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's look-up imports all its trainers, which takes seconds."""
    monkeypatch.setattr(methods_module, "find_trainer", lambda *names: object)


@pytest.mark.usefixtures("any_trainer")
@pytest.mark.parametrize(
    ("trainers", "plans", "expected"),
    [
        (["A"], [], [("A", "nnUNetPlans")]),
        (["A", "B"], ["P"], [("A", "P"), ("B", "P")]),
        (["A", "B"], ["P", "Q"], [("A", "P"), ("B", "Q")]),
        (["A@Q", "B"], ["P"], [("A", "Q"), ("B", "P")]),
        (["A", "A@Q"], [], [("A", "nnUNetPlans"), ("A", "Q")]),
        (["nnunet", "resenc-l"], [], [("nnUNetTrainer", "nnUNetPlans"), ("nnUNetTrainer", "nnUNetResEncUNetLPlans")]),
        (["nnunet", "B"], ["P"], [("nnUNetTrainer", "nnUNetPlans"), ("B", "P")]),
        (["primus-m@P"], [], [("nnUNet_Primus_M_Trainer", "P")]),
    ],
)
def test_trainers_and_plans_make_methods(
    trainers: list[str], plans: list[str], expected: list[tuple[str, str]]
) -> None:
    assert parse_methods(trainers, plans, "2d") == tuple(Method(t, p, "2d") for t, p in expected)


@pytest.mark.usefixtures("any_trainer")
@pytest.mark.parametrize(
    ("trainers", "plans", "message"),
    [
        ([], [], "--trainers: name at least one"),
        (["A", "B", "C"], ["P", "Q"], "--plans"),
        (["A", "A"], [], "A with nnUNetPlans is named twice"),
        (["nnunet", "nnUNetTrainer"], [], "nnUNetTrainer with nnUNetPlans is named twice"),
        (["A@Q", "B"], ["P", "P"], "A@Q has the plans Q, but --plans gives it P"),
        (["A@"], [], "write TRAINER@PLANS"),
    ],
)
def test_wrong_trainers_and_plans(trainers: list[str], plans: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_methods(trainers, plans, "2d")


def test_every_baseline_is_found_and_an_unknown_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    found = parse_methods([*methods_module.BASELINES, "MaskSAMTrainer"], [], "3d_fullres")
    assert len(found) == len(methods_module.BASELINES) + 1
    with pytest.raises(UsageError, match=r"MaskSAMTrainr: nnU-Net finds no such trainer.*mean MaskSAMTrainer"):
        parse_methods(["MaskSAMTrainr"], [], "3d_fullres")


@pytest.mark.parametrize(
    ("devices", "kind"), [(["cpu"], "cpu"), (["0", "1"], "cuda"), (["cuda"], "cuda"), (["mps"], "mps")]
)
def test_kind_of_devices(devices: list[str], kind: str) -> None:
    assert device_kind(devices) == kind


@pytest.mark.parametrize("devices", [[], ["cpu", "0"], ["0", "0"], ["gpu"], ["cuda", "1"]])
def test_wrong_devices(devices: list[str]) -> None:
    with pytest.raises(BenchmarkError, match="--devices"):
        device_kind(devices)


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_the_default_split_is_nnunets(preprocessed: Path) -> None:
    assert check_grid(grid()) == ()
    written = json.loads((preprocessed / "splits_final.json").read_text())
    theirs = generate_crossval_split(CASES, seed=12345, n_splits=5)
    assert written == [{part: [str(c) for c in fold[part]] for part in ("train", "val")} for fold in theirs]


def test_a_grid_becomes_a_job_for_each_fold(preprocessed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_RANDOM_INIT", "1")
    jobs = grid_jobs(grid(STOCK, BUDGET, folds=(0, 3), minutes=2.0))
    assert [(job.fold, job.method, job.minutes) for job in jobs] == [
        (0, STOCK, None),
        (0, BUDGET, 2.0),
        (3, STOCK, None),
        (3, BUDGET, 2.0),
    ]
    assert jobs[0].environment["MASKSAM_RANDOM_INIT"] == "1"
    assert jobs[0].folder == preprocessed.parents[1] / "results" / DATASET / STOCK.key / "fold_0"


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
@pytest.mark.usefixtures("preprocessed")
def test_a_missing_variable_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(BenchmarkError, match=f"{variable} is not set"):
        check_grid(grid())


@pytest.mark.usefixtures("preprocessed")
def test_an_unknown_dataset_is_named() -> None:
    with pytest.raises(BenchmarkError, match="-d 77: no such dataset"):
        find_benchmark_dataset("77")
    assert find_benchmark_dataset("4") == DATASET


def spoil_data(preprocessed: Path) -> None:
    next(preprocessed.glob("*/case_003.b2nd")).unlink()


def spoil_plans(preprocessed: Path) -> None:
    (preprocessed / "nnUNetPlans.json").unlink()


def cut_plans(preprocessed: Path) -> None:
    file = preprocessed / "nnUNetPlans.json"
    file.write_text(file.read_text()[:100])


def three_folds(preprocessed: Path) -> None:
    splits = [{"train": CASES[1:], "val": CASES[:1]}] * 3
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))


def foreign_cases(preprocessed: Path) -> None:
    splits = [{"train": CASES[1:], "val": ["other"]}] * 5
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))


def no_splits_in_file(preprocessed: Path) -> None:
    (preprocessed / "splits_final.json").write_text('[{"train": []}]')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_plans, "there is no .*nnUNetPlans.json; make it with: nnUNetv2_plan_and_preprocess -d 4"),
        (cut_plans, "is not a whole plans file"),
        (spoil_data, r"lacks 1 of 10 cases, such as case_003; .*nnUNetv2_preprocess -d 4 -plans_name nnUNetPlans"),
        (three_folds, "holds folds 0 to 2, not 3, 4; nnU-Net would silently train on a random split"),
        (foreign_cases, "fold 0 names 1 cases that the dataset does not have, such as other"),
        (no_splits_in_file, "does not hold folds"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    preprocessed: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(preprocessed)
    with pytest.raises(BenchmarkError, match=message):
        check_grid(grid())


@pytest.mark.parametrize(
    ("plans", "command"),
    [
        ("nnUNetResEncUNetLPlans", "nnUNetv2_plan_experiment -d 4 -pl nnUNetPlannerResEncL"),
        ("MaskSAMPlans", "masksam plan -d 4 --plans-name MaskSAMPlans"),
    ],
)
@pytest.mark.usefixtures("preprocessed")
def test_missing_plans_name_the_command_that_makes_them(plans: str, command: str) -> None:
    with pytest.raises(BenchmarkError, match=command):
        check_grid(grid(Method("nnUNetTrainer", plans, "3d_fullres")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": (BUDGET,)}, "nnUNetTrainer_budget train by the clock: give --minutes"),
        ({"minutes": 3.0}, "--minutes 3 is for trainers that stop by the clock"),
        ({"methods": (BUDGET,), "minutes": -1.0}, "--minutes -1"),
        ({"folds": ()}, "--folds"),
        ({"folds": (0, 0)}, "--folds 0 0"),
        ({"folds": (5,)}, "nnU-Net's default split has folds 0 to 4"),
        ({"device": "tpu"}, "--devices 'tpu'"),
        ({"methods": (Method("nnUNetTrainer", "nnUNetPlans", "4d"),)}, "-c 4d: .* has no such configuration"),
    ],
)
@pytest.mark.usefixtures("preprocessed")
def test_options_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        check_grid(grid(**changes))


@pytest.mark.usefixtures("preprocessed")
def test_minutes_for_some_methods_only_are_told() -> None:
    (note,) = check_grid(grid(STOCK, BUDGET, minutes=3.0))
    assert STOCK.key in note and BUDGET.key not in note


def test_primus_needs_a_patch_that_its_tokens_divide(preprocessed: Path) -> None:
    file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [12, 32, 32]
    file.write_text(json.dumps(plans))
    with pytest.raises(BenchmarkError, match="needs a patch size that 8 divides"):
        check_grid(grid(Method("nnUNet_Primus_M_Trainer", "nnUNetPlans", "3d_fullres")))


def test_several_cases_of_a_patient_need_a_split_by_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [f"patient{n:03d}_frame{frame:02d}" for n in range(5) for frame in (1, 2)]
    preprocessed = place_dataset(tmp_path, monkeypatch, cases)
    with pytest.raises(BenchmarkError, match=r"patients have several cases.*masksam split -d 4"):
        check_grid(grid())
    assert not (preprocessed / "splits_final.json").exists()
    apart = [{"train": [c for c in cases if c not in val], "val": val} for val in (cases[n::5] for n in range(5))]
    (preprocessed / "splits_final.json").write_text(json.dumps(apart))
    with pytest.raises(BenchmarkError, match="seems to separate cases of one patient"):
        check_grid(grid())
    (note,) = check_grid(grid(), accept_unfair=True)
    assert "seems to separate cases of one patient" in note
    with pytest.raises(BenchmarkError, match="validates patients it was trained on"):
        check_grid(replace(grid(), group="patient(\\d+)_"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("splits_final.json", "splits_final.json in nnUNet_preprocessed has changed since"),
        ("nnUNetPlans.json", "nnUNetPlans.json in nnUNet_preprocessed has changed since"),
        (None, "trained with --minutes 2, not 3"),
    ],
)
def test_folds_begun_with_other_inputs_are_refused(preprocessed: Path, changed: str | None, message: str) -> None:
    begun = grid(BUDGET, minutes=2.0)
    check_grid(begun)
    folder = begun.results / BUDGET.key / "fold_1"
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()
    inputs = Inputs.read(preprocessed, "nnUNetPlans")
    FoldRecord(folder, BUDGET.trainer, BUDGET.plans, BUDGET.configuration, 2.0, inputs).write()
    check_grid(begun)
    if changed is not None:
        file = preprocessed / changed
        file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    with pytest.raises(BenchmarkError, match=message):
        check_grid(begun if changed is not None else replace(begun, minutes=3.0))


# ---- state of a fold -------------------------------------------------------------------------------------------------


def write_checkpoint(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 5000)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(bytes(content))


def write_validation(folder: Path, cases: list[str], endings: tuple[str, ...] = (".nii.gz", ".npz", ".pkl")) -> None:
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    zipped = io.BytesIO()
    np.savez(zipped, probabilities=np.zeros(9))
    contents = {".nii.gz": b"x", ".npz": zipped.getvalue(), ".pkl": pickle.dumps({"spacing": [1, 1, 1]})}
    for case in cases:
        for ending in endings:
            (folder / "validation" / f"{case}{ending}").write_bytes(contents[ending])
    scored = [{"prediction_file": f"/elsewhere/{case}.nii.gz"} for case in cases]
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": scored}))


def stage(folder: Path, npz: bool = True) -> Stage:
    return fold_state(folder, CASES[:2], ".nii.gz", npz).stage


def test_the_stages_of_a_fold(tmp_path: Path) -> None:
    fold = tmp_path / "fold_0"
    assert stage(fold) is Stage.MISSING
    fold.mkdir()
    (fold / "debug.json").touch()
    assert stage(fold) is Stage.MISSING
    write_checkpoint(fold / "checkpoint_best.pth")
    assert stage(fold) is Stage.BROKEN_OFF
    write_checkpoint(fold / "checkpoint_final.pth")
    assert stage(fold) is Stage.TRAINED
    write_validation(fold, CASES[:1])
    assert stage(fold) is Stage.TRAINED
    write_validation(fold, CASES[:2])
    assert stage(fold) is Stage.DONE


def test_a_validation_that_lacks_something_is_not_done(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    write_validation(tmp_path, CASES[:2], (".nii.gz",))
    assert stage(tmp_path, npz=False) is Stage.DONE
    lacking = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=True)
    assert lacking.stage is Stage.TRAINED and ".npz" in lacking.reason
    summary = tmp_path / "validation" / "summary.json"
    summary.write_text(summary.read_text()[:20])
    assert stage(tmp_path, npz=False) is Stage.TRAINED
    summary.unlink()
    assert stage(tmp_path, npz=False) is Stage.TRAINED


@pytest.mark.parametrize("spoil", [cut, flip])
@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    write_checkpoint(tmp_path / name)
    spoil(tmp_path / name)
    state = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=False)
    assert state.stage is Stage.DAMAGED
    assert str(tmp_path / name) in state.reason and "remove" in state.reason


def test_the_remedy_names_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_best.pth")
    write_checkpoint(tmp_path / "checkpoint_latest.pth")
    cut(tmp_path / "checkpoint_latest.pth")
    assert "goes on from checkpoint_best.pth" in fold_state(tmp_path, CASES[:2], ".nii.gz", False).reason
    (tmp_path / "checkpoint_latest.pth").unlink()
    assert stage(tmp_path) is Stage.BROKEN_OFF


def test_predictions_of_an_earlier_training_do_not_count(tmp_path: Path) -> None:
    write_validation(tmp_path, CASES[:2])
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    os.utime(tmp_path / "validation" / "summary.json", (1, 1))
    state = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=True)
    assert state.stage is Stage.TRAINED and "older" in state.reason


def write_log(folder: Path, day: str, *lines: str) -> None:
    """As nnU-Net's print_to_log_file, which ends lines with a space."""
    text = "".join(f"2026-11-23 21:01:40.680213: {line} \n" for line in lines)
    (folder / f"training_log_2026_{day}_21_01_30.txt").write_text(text)


def test_a_copy_of_a_done_fold_is_done(tmp_path: Path) -> None:
    """Its files' times are those of the copying, in any order; nnU-Net's logs go with it."""
    write_validation(tmp_path, CASES[:2])
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    os.utime(tmp_path / "validation" / "summary.json", (1, 1))
    write_log(tmp_path, "11_9", "Epoch 3", "Training done.", "predicting a", "Validation complete", "Mean Dice: 0.5")
    assert stage(tmp_path) is Stage.DONE
    write_log(tmp_path, "11_10", "Epoch 0", "Training done.", "predicting a")  # trained again, then killed
    os.utime(tmp_path / "validation" / "summary.json")
    state = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=True)
    assert state.stage is Stage.TRAINED and "log has no complete validation" in state.reason
    write_log(tmp_path, "11_11", "predicting a", "Validation complete")  # made up for, by --val
    assert stage(tmp_path) is Stage.DONE


@pytest.mark.parametrize("ending", [".npz", ".pkl"])
def test_probabilities_that_were_cut_short_are_made_anew(tmp_path: Path, ending: str) -> None:
    write_validation(tmp_path, CASES[:2])
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    os.utime(tmp_path / "validation" / "summary.json")
    assert stage(tmp_path) is Stage.DONE
    file = tmp_path / "validation" / f"{CASES[1]}{ending}"
    file.write_bytes(file.read_bytes()[:-1])
    state = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=True)
    assert state.stage is Stage.TRAINED and f"1 of 2 validation cases lack a whole {ending} file" in state.reason


def test_a_damaged_end_costs_no_more_than_that(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_latest.pth")
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    cut(tmp_path / "checkpoint_final.pth")
    state = fold_state(tmp_path, CASES[:2], ".nii.gz", npz=True)
    assert state.stage is Stage.DAMAGED and "goes on from checkpoint_latest.pth" in state.reason
    (tmp_path / "checkpoint_final.pth").unlink()
    assert stage(tmp_path) is Stage.BROKEN_OFF


def test_a_truncated_checkpoint_of_a_done_fold_is_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    write_validation(tmp_path, CASES[:2])
    cut(tmp_path / "checkpoint_final.pth")
    assert stage(tmp_path) is Stage.DAMAGED


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    refused = pytest.raises(BenchmarkError, match="another process trains; wait until it has ended")
    with locked(tmp_path, "", wait=0.1), refused, locked(tmp_path, "another process trains", wait=0.1):
        pass
    with locked(tmp_path, "", wait=0.1):
        pass
