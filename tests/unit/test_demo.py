"""What the demo does around the benchmark: arguments, its folder, raw data, the commands it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from masksam_nnunet.benchmarks import demo
from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.demo import TRAINERS, next_commands, run_demo
from masksam_nnunet.errors import DataError, MaskSAMError, UsageError
from masksam_nnunet.inference.phantoms import write_phantom_dataset
from masksam_nnunet.plans.raw_data import place_raw_dataset, read_raw_dataset


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("phantoms"), num_cases=5, num_test_cases=0)


@pytest.fixture
def raw(tmp_path: Path, phantoms: Path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "raw" / phantoms.name))


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch, phantoms: Path) -> list[Any]:
    """Commands of nnU-Net, and the benchmark, that would have run."""
    ran: list[Any] = []

    def run_nnunet(command: str, arguments: list[str], environment: object, log: Path) -> None:
        ran.append(command)
        preprocessed = log.parents[1] / "nnUNet_preprocessed" / demo.DATASET_NAME
        preprocessed.mkdir(parents=True, exist_ok=True)
        configurations = {"2d": {"batch_size": 99}, "3d_fullres": {"batch_size": 9}}
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps({"configurations": configurations}))

    def run_benchmark(benchmark: Benchmark, out: Path, devices: list[str], console: object) -> Path:
        ran.append(benchmark)
        return out / "report.html"

    monkeypatch.setattr(demo, "run_nnunet", run_nnunet)
    monkeypatch.setattr(demo, "run_benchmark", run_benchmark)
    monkeypatch.setattr(demo, "require_sound_dataset", lambda folder: None)
    monkeypatch.setattr(demo, "write_phantom_dataset", lambda raw, seed: shutil.copytree(phantoms, raw / phantoms.name))
    return ran


def test_the_demo_is_a_benchmark_of_one_fold_and_prepares_its_data_once(tmp_path: Path, nnunet: list[Any]) -> None:
    out = tmp_path / "out"
    (out.parent / "out").mkdir()  # an empty folder will do
    page = run_demo(out, minutes=0.5, batch_size=3, fold=1)
    assert page == out / "report.html"
    command, benchmark = nnunet
    assert command == "nnUNetv2_plan_and_preprocess"
    assert [method.trainer for method in benchmark.methods] == list(TRAINERS)
    assert (benchmark.folds, benchmark.minutes, benchmark.ensembles) == ((1,), 0.5, False)
    preprocessed = out / "nnUNet_preprocessed" / demo.DATASET_NAME
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 3

    run_demo(out, minutes=0.5, batch_size=3, fold=1)
    assert nnunet == [command, benchmark, benchmark]
    with pytest.raises(UsageError, match=r"minutes was 0\.5, is 2\.0"):
        run_demo(out, minutes=2.0, batch_size=3, fold=1)
    (out / "demo.json").write_text("{")
    with pytest.raises(UsageError, match=r"demo\.json"):
        run_demo(out)


@pytest.mark.usefixtures("nnunet")
def test_folds_are_drawn_by_patient(tmp_path: Path, raw: Path) -> None:
    for file in [*raw.glob("*Tr/*.nii.gz")]:
        for frame in ("a", "b"):
            file.with_name(f"patient{file.name[8:11]}_{frame}{file.name[11:]}").hardlink_to(file)
        file.unlink()
    description = json.loads((raw / "dataset.json").read_text()) | {"numTraining": 10}
    (raw / "dataset.json").write_text(json.dumps(description))
    run_demo(tmp_path / "out", raw)
    assert (tmp_path / "out" / "nnUNet_raw" / raw.name).is_symlink()
    splits = json.loads((tmp_path / "out" / "nnUNet_preprocessed" / raw.name / "splits_final.json").read_text())
    for split in splits:
        train, val = ({case[:-2] for case in split[part]} for part in ("train", "val"))
        assert not train & val


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not ours")
    for out in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(UsageError, match="--out"):
            run_demo(out)
    with pytest.raises(MaskSAMError, match="Dataset001_X"):
        run_demo(tmp_path / "out", tmp_path / "Dataset001_X")
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_next_commands_predict_with_both_and_ensemble(raw: Path) -> None:
    lines = next_commands(read_raw_dataset(raw), "3d_fullres", 0, ["A", "B"], "cpu")
    assert lines[0] == 'export nnUNet_raw="$OUT/nnUNet_raw"' and lines[3] == 'eval "$(masksam env)"'
    assert "imagesTr" in lines[4]  # no test images
    assert [line.split()[0] for line in lines[4:]] == ["nnUNetv2_predict", "nnUNetv2_predict", "nnUNetv2_ensemble"]
    (raw / "imagesTs" / "x_0000.nii.gz").write_bytes(b"")
    assert "imagesTs" in next_commands(read_raw_dataset(raw), "3d_fullres", 0, ["A"], "cpu")[4]


# ---- raw datasets ----------------------------------------------------------------------------------------------------


def test_a_folder_name_that_nnunet_does_not_find(raw: Path) -> None:
    with pytest.raises(DataError, match="Dataset4_Hippocampus"):
        read_raw_dataset(raw.rename(raw.with_name("Dataset4_Hippocampus")))


def test_dataset_is_linked_by_its_own_name(raw: Path, tmp_path: Path) -> None:
    dataset = read_raw_dataset(raw)
    assert (dataset.name, dataset.number) == (raw.name, "901")
    placed = place_raw_dataset(dataset, tmp_path / "out")
    assert placed.folder == tmp_path / "out" / raw.name and placed.folder.is_symlink()
    assert place_raw_dataset(dataset, tmp_path / "out") == placed
    alias = tmp_path / "Dataset007_Alias"
    alias.symlink_to(raw)
    assert read_raw_dataset(alias).number == "7"
