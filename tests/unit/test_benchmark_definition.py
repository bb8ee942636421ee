"""What a benchmark's folder is about, and what its command refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from masksam_nnunet.benchmarks.fairness_splits import check_splits
from masksam_nnunet.benchmarks.fold_record import FoldRecord, Inputs
from masksam_nnunet.benchmarks.grid import Grid
from masksam_nnunet.benchmarks.names import joint_name, row_names
from masksam_nnunet.benchmarks.report_job import ReportJob
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.benchmarks.run import DEFINITION_FILE, Definition, command_line
from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import BenchmarkError

METHODS = (Method("nnUNetTrainer", "nnUNetPlans", "2d"), Method("MaskSAMTrainer", "MaskSAMPlans", "2d"))
DEFINITION = Definition(Grid("Dataset004_A", "2d", METHODS, (0, 1), 2.5, "cpu"), accept_unfair=True, processes=3)


def test_a_definition_comes_back_as_it_was_written(tmp_path: Path) -> None:
    DEFINITION.write(tmp_path)
    assert Definition.read(tmp_path) == DEFINITION
    more = replace(DEFINITION, grid=replace(DEFINITION.grid, folds=(0, 1, 2)))
    more.write(tmp_path)
    assert Definition.read(tmp_path) == more


def test_a_folder_belongs_to_one_dataset_and_configuration(tmp_path: Path) -> None:
    DEFINITION.write(tmp_path)
    for change in ({"dataset": "Dataset005_B"}, {"configuration": "3d_fullres"}):
        other = replace(DEFINITION, grid=replace(DEFINITION.grid, **change))
        with pytest.raises(BenchmarkError, match="holds a benchmark of Dataset004_A, 2d; give another folder"):
            other.write(tmp_path)
    assert Definition.read(tmp_path) == DEFINITION


def test_a_definition_is_told_as_a_command() -> None:
    expected = (
        "masksam benchmark -d Dataset004_A -c 2d --trainers nnUNetTrainer@nnUNetPlans MaskSAMTrainer@MaskSAMPlans "
        "--folds 0 1 --minutes 2.5 --devices cpu"
    )
    assert command_line(DEFINITION) == expected + " --accept-unfair"
    grid = replace(DEFINITION.grid, group="(p[0-9]+)_")
    other = replace(DEFINITION, grid=grid, accept_unfair=False, ensembles=False)
    assert command_line(other) == expected + " --no-ensembles --group '(p[0-9]+)_'"


@pytest.mark.parametrize("content", ["{", "[]", '{"grid": {}}', '{"grid": {"methods": [{"trainer": 1}]}}'])
def test_a_damaged_definition_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / DEFINITION_FILE).write_text(content)
    with pytest.raises(BenchmarkError, match="is not readable"):
        Definition.read(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="cannot be written"):
        DEFINITION.write(tmp_path / "file" / "folder")


def test_report_on_no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "is no benchmark's folder" in done.output
    with pytest.raises(BenchmarkError, match="no benchmark's folder"):
        ReportJob(tmp_path)()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark's folder, of two folds of which nothing is trained."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path))
    folder = tmp_path / DEFINITION.grid.dataset
    folder.mkdir()
    (folder / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    (folder / "splits_final.json").write_text(
        json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}])
    )
    DEFINITION.write(tmp_path / "bench")
    return tmp_path / "bench"


def reported(bench: Path) -> str:
    done = CliRunner().invoke(app, ["report", str(bench)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    return done.output


def test_report_on_folds_that_are_not_trained(bench: Path) -> None:
    told = reported(bench)
    assert told.count("missing; there is no checkpoint") == 4 and "run masksam benchmark again" in told


def test_report_tells_what_has_changed_since_the_training(bench: Path) -> None:
    method = METHODS[0]
    fold = bench.parent / DEFINITION.grid.dataset / method.key / "fold_1"
    fold.mkdir(parents=True)
    plans = fold.parents[1] / "nnUNetPlans.json"
    plans.touch()
    inputs = replace(Inputs.read(fold.parents[1], "nnUNetPlans"), splits_sha256="0" * 64)
    FoldRecord(fold, *(method.trainer, method.plans, method.configuration), None, inputs).write()
    assert "fold_1: missing; there is no checkpoint; splits_final.json in nnUNet_preprocessed has ch" in reported(bench)
    plans.unlink()
    assert f"there is no checkpoint; {plans} cannot be read" in reported(bench)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("splits_final.json", '[{"train": ["a"], "val": ["b"]}]', "--folds 1: splits_final.json has 1 folds"),
        ("splits_final.json", "{}", "is not a list of folds"),
        ("splits_final.json", "[{", "is not JSON"),
        ("splits_final.json", None, "cannot be read"),
        ("dataset.json", "[]", "is not nnU-Net's"),
        ("dataset.json", None, "cannot be read"),
    ],
)
def test_report_on_data_that_are_not_there_any_more(bench: Path, name: str, content: str | None, message: str) -> None:
    file = bench.parent / DEFINITION.grid.dataset / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert message in reported(bench)


def test_nnunets_folders_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    done = CliRunner().invoke(app, ["benchmark", "-d", "4", "--trainers", "nnunet"])
    assert done.exit_code == 1 and "is not set" in done.output


def test_a_clusters_options_need_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path))
    (tmp_path / "Dataset004_A").mkdir()
    (tmp_path / "Dataset004_A" / "dataset.json").write_text(json.dumps({}))
    command = ["benchmark", "-d", "4", "--trainers", "nnunet", "--devices", "cpu", "--partition", "gpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "add --executor slurm" in done.output


def test_rows_are_called_by_what_tells_them_apart() -> None:
    a, b = METHODS
    assert row_names(METHODS) == {a: "nnUNetTrainer", b: "MaskSAMTrainer (MaskSAMPlans)"}
    twice = (a, replace(a, plans="nnUNetResEncUNetLPlans"))
    assert list(row_names(twice).values()) == ["nnUNetTrainer (nnUNetPlans)", "nnUNetTrainer (nnUNetResEncUNetLPlans)"]
    assert joint_name(["a", "b"]) == "a + b"


def test_an_expression_tells_patients_where_names_do_not() -> None:
    grid = replace(DEFINITION.grid, group=r"^(\w\d+)x")
    cases = ["a1x1", "a1x2", "b2x1", "b2x2"]
    patients = grid.patients(cases)
    assert patients == {"a1x1": "a1", "a1x2": "a1", "b2x1": "b2", "b2x2": "b2"}
    assert DEFINITION.grid.patients(cases) is None
    apart = [{"train": ["a1x1", "b2x1"], "val": ["a1x2"]}, {"train": ["a1x1", "a1x2"], "val": ["b2x1", "b2x2"]}]
    texts = [f.text for f in check_splits(apart, (0,), cases, "Dataset004_A", patients)]
    assert "Fold 0 validates patients it was trained on: a1." in texts
    assert not any("patients" in f.text for f in check_splits(apart, (1,), cases, "Dataset004_A", patients))
    with pytest.raises(BenchmarkError, match="groups nothing"):
        replace(grid, group="(.+)").patients(cases)
