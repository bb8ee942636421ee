"""What a benchmark compares, what must hold before it trains, and what its commands refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from empty_dataset import DATASET, place_dataset
from nnunetv2.utilities.crossval_split import generate_crossval_split
from typer.testing import CliRunner

from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.folds import FoldRecord, input_hashes
from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import DataError, MaskSAMError, TrainingError, UsageError
from masksam_nnunet.inference import methods as methods_module
from masksam_nnunet.inference.methods import ModelName, parse_methods

CASES = [f"case_{n:03d}" for n in range(10)]
STOCK = ModelName("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
BUDGET = ModelName("nnUNetTrainer_budget", "nnUNetPlans", "3d_fullres")


@pytest.fixture
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_dataset(tmp_path, monkeypatch, CASES)


def benchmark(*methods: ModelName, **changes: object) -> Benchmark:
    values = {"dataset": DATASET, "configuration": "3d_fullres", "folds": range(5), "device": "cpu"}
    return Benchmark.model_validate({**values, "methods": methods or (STOCK,), **changes})


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's look-up imports all its trainers, which takes seconds."""
    monkeypatch.setattr(methods_module, "find_trainer", lambda *names: object)


@pytest.mark.usefixtures("any_trainer")
def test_trainers_and_plans_make_methods() -> None:
    for trainers, plans, expected in (
        ("A", "", "A@nnUNetPlans"),
        ("A B", "P", "A@P B@P"),
        ("A B", "P Q", "A@P B@Q"),
        ("A@Q B", "P", "A@Q B@P"),
        ("nnunet resenc-l", "", "nnUNetTrainer@nnUNetPlans nnUNetTrainer@nnUNetResEncUNetLPlans"),
        ("primus-m@P", "", "nnUNet_Primus_M_Trainer@P"),
    ):
        methods = tuple(ModelName(*one.split("@"), "2d") for one in expected.split())
        assert parse_methods(trainers.split(), plans.split(), "2d") == methods


@pytest.mark.usefixtures("any_trainer")
def test_wrong_trainers_and_plans() -> None:
    wrong = [
        ([], [], "--trainers"),
        (["A", "B", "C"], ["P", "Q"], "--plans"),
        (["nnunet", "nnUNetTrainer"], [], "nnUNetTrainer"),
        (["A@Q", "B"], ["P", "P"], "A@Q"),
        (["A@"], [], "TRAINER@PLANS"),
    ]
    for trainers, plans, named in wrong:
        with pytest.raises(MaskSAMError, match=named):
            parse_methods(trainers, plans, "2d")


def test_every_baseline_is_found_and_an_unknown_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    found = parse_methods([*methods_module.BASELINES, "MaskSAMTrainer"], [], "3d_fullres")
    assert len(found) == len(methods_module.BASELINES) + 1
    with pytest.raises(MaskSAMError, match=r"MaskSAMTrainr.*MaskSAMTrainer"):
        parse_methods(["MaskSAMTrainr"], [], "3d_fullres")


# ---- the definition --------------------------------------------------------------------------------------------------


def test_a_definition_comes_back_as_it_was_written_for_one_dataset_and_configuration(tmp_path: Path) -> None:
    first = benchmark(STOCK, BUDGET, minutes=2.5, accept_unfair=True)
    for one in (first, benchmark(folds=(0, 1))):
        one.write(tmp_path)
        assert Benchmark.read(tmp_path) == one
    with pytest.raises(UsageError, match=DATASET):
        benchmark(configuration="2d").write(tmp_path)
    (tmp_path / "benchmark.json").write_text('{"dataset": 1}')
    with pytest.raises(UsageError, match=r"benchmark\.json"):
        Benchmark.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out"):
        first.write(tmp_path / "file" / "folder")


def test_a_definition_as_a_command() -> None:
    expected = (
        "masksam benchmark -d Dataset004_Small -c 3d_fullres --trainers nnUNetTrainer@nnUNetPlans "
        "nnUNetTrainer_budget@nnUNetPlans --folds 0 1 -device cpu --minutes 2.5"
    )
    one = benchmark(STOCK, BUDGET, folds=(0, 1), minutes=2.5, accept_unfair=True)
    assert one.command_line == expected + " --accept-unfair"
    other = benchmark(STOCK, BUDGET, folds=(0, 1), minutes=2.5, ensembles=False, group="(p[0-9]+)_")
    assert other.command_line == expected + " --no-ensembles --group '(p[0-9]+)_'"
    quick = benchmark(STOCK, BUDGET, folds=(0, 1), minutes=2.5, ensembles=False, postprocessing=False)
    assert quick.command_line == expected + " --no-ensembles --no-postprocessing"


def test_a_benchmark_has_a_job_for_each_fold(preprocessed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_RANDOM_INIT", "1")
    jobs = benchmark(STOCK, BUDGET, folds=(0, 3), minutes=2.0).jobs()
    expected = [(0, STOCK, None), (0, BUDGET, 2.0), (3, STOCK, None), (3, BUDGET, 2.0)]
    assert [(job.fold, job.method, job.minutes) for job in jobs] == expected
    assert jobs[0].environment["MASKSAM_RANDOM_INIT"] == "1" and jobs[0].npz
    assert jobs[0].folder == preprocessed.parents[1] / "results" / DATASET / STOCK.key / "fold_0"


# ---- before the training ---------------------------------------------------------------------------------------------


def test_the_default_split_is_nnunets(preprocessed: Path) -> None:
    assert benchmark().check() == []
    written = json.loads((preprocessed / "splits_final.json").read_text())
    theirs = generate_crossval_split(CASES, seed=12345, n_splits=5)
    assert written == [{part: [str(c) for c in fold[part]] for part in ("train", "val")} for fold in theirs]


def splits(*folds: dict[str, list[str]]) -> Callable[[Path], object]:
    return lambda preprocessed: (preprocessed / "splits_final.json").write_text(json.dumps(folds))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "nnUNetPlans.json").unlink(), r"nnUNetPlans\.json.*nnUNetv2_plan_and_prepro.* -d 4"),
        (lambda folder: (folder / "nnUNetPlans.json").write_text("{"), r"nnUNetPlans\.json"),
        (lambda folder: next(folder.glob("*/case_003.b2nd")).unlink(), "case_003.*nnUNetv2_preprocess -d 4"),
        (splits(*[{"train": CASES[1:], "val": CASES[:1]}] * 3), "--folds 3, 4"),
        (splits(*[{"train": CASES[1:], "val": ["other"]}] * 5), "other"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    preprocessed: Path, spoil: Callable[[Path], object], named: str
) -> None:
    spoil(preprocessed)
    with pytest.raises(MaskSAMError, match=named):
        benchmark().check()


@pytest.mark.usefixtures("preprocessed")
def test_options_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelName("nnUNetTrainer", "MaskSAMPlans", "3d_fullres")
    for changes, named in (
        ({"methods": (BUDGET,)}, "--minutes"),
        ({"minutes": 3.0}, "--minutes 3"),
        ({"methods": (BUDGET,), "minutes": -1.0}, "--minutes -1"),
        ({"methods": (BUDGET,), "minutes": 1.0, "iterations": 9}, "--minutes 1 and --iterations 9"),
        ({"methods": (BUDGET,), "iterations": 0}, "--iterations 0"),
        ({"folds": (0, 0)}, "--folds 0, 0"),
        ({"folds": (5,)}, "--folds 5"),
        ({"methods": (ModelName("nnUNetTrainer", "nnUNetPlans", "4d"),)}, "-c 4d"),
        ({"methods": (other,)}, "masksam plan -d 4"),
        ({"dataset": "Dataset077_No"}, "77"),
    ):
        with pytest.raises(MaskSAMError, match=named):
            benchmark(**changes).check()
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(DataError, match="nnUNet_results"):
        benchmark().check()


def test_notes_and_patches(preprocessed: Path) -> None:
    (note,) = benchmark(STOCK, BUDGET, minutes=3.0).check()
    assert STOCK.trainer in note and BUDGET.trainer not in note
    file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [12, 32, 32]
    file.write_text(json.dumps(plans))
    with pytest.raises(MaskSAMError, match=r"nnUNet_Primus_M_Trainer.*\[12, 32, 32\]"):
        benchmark(ModelName("nnUNet_Primus_M_Trainer", "nnUNetPlans", "3d_fullres")).check()


def test_several_cases_of_a_patient_need_a_split_by_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [f"patient{n:03d}_frame{frame:02d}" for n in range(5) for frame in (1, 2)]
    preprocessed = place_dataset(tmp_path, monkeypatch, cases)
    with pytest.raises(MaskSAMError, match="masksam split -d 4"):
        benchmark().check()
    assert not (preprocessed / "splits_final.json").exists()
    apart = [{"train": [c for c in cases if c not in val], "val": val} for val in (cases[n::5] for n in range(5))]
    splits(*apart)(preprocessed)
    with pytest.raises(MaskSAMError, match="--accept-unfair"):
        benchmark().check()
    (note,) = benchmark(accept_unfair=True).check()
    assert "patient000_frame01" in note
    with pytest.raises(MaskSAMError, match="patient000"):
        benchmark(group="(patient\\d+)_").check()
    with pytest.raises(MaskSAMError, match="--group"):
        benchmark(group="(.+)").check()


def test_folds_begun_with_other_inputs_are_refused(preprocessed: Path) -> None:
    begun = benchmark(BUDGET, minutes=2.0)
    begun.check()
    folder = begun.results / BUDGET.key / "fold_1"
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()
    inputs = input_hashes(preprocessed, BUDGET.plans, "3d_fullres")
    record = FoldRecord(
        trainer=BUDGET.trainer, plans=BUDGET.plans, configuration="3d_fullres", minutes=2.0, inputs=inputs
    )
    record.write(folder)
    begun.check()
    file = preprocessed / f"{BUDGET.plans}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"] = {}
    file.write_text(json.dumps(plans, indent=7))
    begun.check()
    plans["configurations"]["3d_fullres"] |= {"batch_size": 7}
    file.write_text(json.dumps(plans))
    with pytest.raises(TrainingError, match=rf"{BUDGET.plans}\.json"):
        begun.check()
    with pytest.raises(TrainingError, match="--minutes"):
        benchmark(BUDGET, minutes=3.0).check()
    file = preprocessed / "splits_final.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    with pytest.raises(TrainingError, match=r"splits_final\.json"):
        begun.check()


# ---- the commands ----------------------------------------------------------------------------------------------------


def refused(*command: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    return done.output


def test_a_report_needs_trained_folds_and_their_data(preprocessed: Path, tmp_path: Path) -> None:
    assert "benchmark.json" in refused("report", tmp_path)
    definition = benchmark(folds=(0, 1))
    definition.check()
    definition.write(tmp_path / "bench")
    assert refused("report", tmp_path / "bench").count("no checkpoint") == 2
    for name, content in (("splits_final.json", "[]"), ("splits_final.json", "[{"), ("dataset.json", "{}")):
        (preprocessed / name).write_text(content)
        assert name in refused("report", tmp_path / "bench")


@pytest.mark.usefixtures("preprocessed", "any_trainer")
def test_the_command_names_what_is_missing() -> None:
    command = ("benchmark", "-d", 4, "--trainers", "nnunet", "-device", "cpu")
    assert "--executor slurm" in refused(*command, "--partition", "gpu")
    assert "--minutes" in refused(*command, "--minutes", 3)
