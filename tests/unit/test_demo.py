"""What the demo does around the benchmark: arguments, its folder, raw data, the commands it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from configs import tiny_config
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import plain_plans
from rich.console import Console

from masksam_nnunet.benchmarks import demo
from masksam_nnunet.benchmarks.definition import FOLDERS, Benchmark
from masksam_nnunet.benchmarks.demo import FLOOR, next_commands, run_demo
from masksam_nnunet.benchmarks.jobs import FoldJob
from masksam_nnunet.errors import DataError, MaskSAMError, UsageError, WeightsError
from masksam_nnunet.inference.methods import ModelName
from masksam_nnunet.inference.phantoms import write_phantom_dataset
from masksam_nnunet.plans.architecture import read_config
from masksam_nnunet.plans.raw_data import RawDataset, place_raw_dataset, read_raw_dataset


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("phantoms"), num_cases=5, num_test_cases=0)


@pytest.fixture
def raw(tmp_path: Path, phantoms: Path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "raw" / phantoms.name))


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch, phantoms: Path) -> list[Any]:
    """Commands of nnU-Net, and benchmarks, that would have run. An iteration takes 2 seconds, of LiteMedSAM 4."""
    ran: list[Any] = []

    def run_nnunet(command: str, arguments: list[str], environment: object, log: Path) -> None:
        ran.append(command)
        preprocessed = log.parents[1] / "nnUNet_preprocessed" / demo.DATASET_NAME
        preprocessed.mkdir(parents=True, exist_ok=True)
        plans = plain_plans((6, 80, 80), batch_size=9)
        plans["configurations"]["2d"] = plans["configurations"]["3d_fullres"]
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
        (preprocessed / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b", "c"]}] * 5))

    def step_seconds(jobs: Sequence[FoldJob]) -> float:
        ran.append("measured")
        return sum(4.0 if "lite_medsam" in job.method.trainer else 2.0 for job in jobs)

    def run_benchmark(benchmark: Benchmark, out: Path, devices: list[str], console: object) -> Path:
        ran.append(benchmark)
        for job in benchmark.jobs():
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "training_stats.json").write_text(json.dumps({"train_seconds": 60.0}))
        return out / "report.html"

    monkeypatch.setattr(demo, "run_nnunet", run_nnunet)
    monkeypatch.setattr(demo, "step_seconds", step_seconds)
    monkeypatch.setattr(demo, "run_benchmark", run_benchmark)
    monkeypatch.setattr(Benchmark, "check", lambda benchmark: [])
    monkeypatch.setattr(demo, "find", lambda backbone: Path(backbone))
    monkeypatch.setattr(demo, "verify", lambda path, backbone: "")
    monkeypatch.setattr(demo, "derive_config", lambda *plans: tiny_config(patch_size=(6, 80, 80)))
    monkeypatch.setattr(demo, "require_sound_dataset", lambda folder: None)
    monkeypatch.setattr(demo, "write_phantom_dataset", lambda raw, seed: shutil.copytree(phantoms, raw / phantoms.name))
    return ran


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FOLDERS:
        monkeypatch.setenv(name, str(tmp_path / "out" / name))
    return tmp_path / "out"


def test_the_demo_is_a_benchmark_of_one_fold_and_prepares_its_data_once(out: Path, nnunet: list[Any]) -> None:
    """6 seconds an iteration of both, so that 20 minutes are enough for more than the fewest."""
    out.mkdir()  # an empty folder will do
    console = Console(record=True, width=200)
    page = run_demo(out, minutes=20, batch_size=3, fold=1, console=console)
    assert page == out / "report.html"
    *before, benchmark = nnunet
    assert before == ["nnUNetv2_plan_and_preprocess", "measured"]
    assert [m.trainer for m in benchmark.methods] == ["nnUNetTrainer_adamw_budget", "MaskSAMTrainer_lite_medsam_budget"]
    assert (benchmark.folds, benchmark.minutes) == ((1,), None)
    assert not benchmark.ensembles and not benchmark.postprocessing
    assert FLOOR < benchmark.iterations < 20 * 60 / 6
    preprocessed = out / "nnUNet_preprocessed" / demo.DATASET_NAME
    for method in benchmark.methods:
        plans = json.loads((preprocessed / f"{method.plans}.json").read_text())
        assert plans["plans_name"] == method.plans and plans["configurations"]["3d_fullres"]["batch_size"] == 3
    config = read_config(PlansManager(plans).get_configuration("3d_fullres"))
    assert config is not None and (config.backbone, config.resolution) == ("lite_medsam", 0.5)
    printed = console.export_text()
    assert "LiteMedSAM" in printed
    assert f"nnUNetTrainer, AdamW: {benchmark.iterations} iterations in " in printed

    run_demo(out, minutes=20, batch_size=3, fold=1)
    assert nnunet == [*before, benchmark, benchmark]
    with pytest.raises(UsageError, match=r"minutes was 20, is 2\.0"):
        run_demo(out, minutes=2.0, batch_size=3, fold=1)
    (out / "demo.json").write_text("{")
    with pytest.raises(UsageError, match=r"demo\.json"):
        run_demo(out)


def test_too_few_iterations_take_longer_and_tiny_takes_the_place_of_missing_weights(
    out: Path, nnunet: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(backbone: str) -> Path:
        raise WeightsError(f"no SAM checkpoint for {backbone}")

    monkeypatch.setattr(demo, "find", find)
    console = Console(record=True, width=200)
    run_demo(out, minutes=1, console=console)
    benchmark = nnunet[-1]
    assert benchmark.iterations == FLOOR and benchmark.methods[1].trainer == "MaskSAMTrainer_tiny_budget"
    printed = console.export_text()
    assert "not SAM" in printed and "longer than the 1 asked for" in printed
    assert "not SAM" in benchmark.notes[0]


@pytest.mark.usefixtures("nnunet")
def test_folds_are_drawn_by_patient(out: Path, raw: Path) -> None:
    for file in [*raw.glob("*Tr/*.nii.gz")]:
        for frame in ("a", "b"):
            file.with_name(f"patient{file.name[8:11]}_{frame}{file.name[11:]}").hardlink_to(file)
        file.unlink()
    description = json.loads((raw / "dataset.json").read_text()) | {"numTraining": 10}
    (raw / "dataset.json").write_text(json.dumps(description))
    run_demo(out, raw)
    assert (out / "nnUNet_raw" / raw.name).is_symlink()
    splits = json.loads((out / "nnUNet_preprocessed" / raw.name / "splits_final.json").read_text())
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
    methods = [ModelName("A", "nnUNetPlans", "3d_fullres"), ModelName("B", "MaskSAMPlans", "3d_fullres")]
    lines = next_commands(read_raw_dataset(raw), methods, 0, "cpu")
    assert lines[0] == 'export nnUNet_raw="$OUT/nnUNet_raw"' and lines[3] == 'eval "$(masksam env)"'
    assert "imagesTr" in lines[4]  # no test images
    assert [line.split()[0] for line in lines[4:]] == ["nnUNetv2_predict", "nnUNetv2_predict", "nnUNetv2_ensemble"]
    (raw / "imagesTs" / "x_0000.nii.gz").write_bytes(b"")
    assert "imagesTs" in next_commands(read_raw_dataset(raw), methods, 0, "cpu")[4]


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


def test_names_of_centres_are_no_patients() -> None:
    """Five folds need five patients; fewer prefixes are taken for centres, and each case for itself."""
    centres = RawDataset(Path("x"), {}, {f"site{s}_{n:03d}": () for s in (1, 2) for n in range(4)}, {})
    assert demo._patients(centres) == {case: [case] for case in centres.images}
    patients = RawDataset(Path("x"), {}, {f"patient{p:02d}_{n}": () for p in range(6) for n in range(2)}, {})
    assert len(demo._patients(patients) or ()) == 6
    assert demo._patients(RawDataset(Path("x"), {}, {f"case_{n}": () for n in range(6)}, {})) is None
