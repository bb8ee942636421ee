"""``masksam benchmark`` and ``masksam report`` as a user runs them, after one fold was killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from nnunet_workspace import Dataset, Workspace

from masksam_nnunet.benchmarks import demo
from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.demo import step_seconds
from masksam_nnunet.benchmarks.folds import FoldRecord, read_fold_compute
from masksam_nnunet.benchmarks.jobs import FoldJob, run_local
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.inference.methods import ModelName
from masksam_nnunet.inference.provenance import History

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9")
EPOCHS = 4
METHODS = tuple(ModelName(trainer, "nnUNetPlans", "3d_fullres") for trainer in ("ShortNNUNet", "ShortMaskSAM"))


@pytest.fixture(scope="module")
def bench(workspace: Workspace, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The small dataset with a labelled test case, in a workspace of its own."""
    extra = {"TEST_MIRRORING": "0", "TEST_EPOCHS": str(EPOCHS), "nnUNet_npp": "0", "nnUNet_nps": "0"}
    mine = Workspace(tmp_path_factory.mktemp("benchmark"), extra=extra)
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(workspace, name) / dataset.name, getattr(mine, name) / dataset.name)
    raw = mine.raw / dataset.name
    for folder, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (raw / f"{folder}Ts").mkdir()
        shutil.copy(raw / f"{folder}Tr" / f"{dataset.cases[0]}{ending}", raw / f"{folder}Ts" / f"unseen{ending}")
    return mine


@pytest.fixture
def jobs(bench: Workspace, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[FoldJob, ...]:
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)
    benchmark = Benchmark(dataset=dataset.name, configuration="3d_fullres", methods=METHODS, folds=(0, 1), device="cpu")
    benchmark.check()
    return benchmark.jobs()


def trainings(job: FoldJob) -> list[psutil.Process]:
    """Processes that train this fold."""
    words = {"nnUNetv2_train", job.method.trainer, str(job.fold)}
    return [p for p in psutil.process_iter(["cmdline"]) if words <= {*(p.info["cmdline"] or [])}]


def files_in(folder: Path, pattern: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob(pattern)}


def test_a_grid_is_trained_compared_and_reported(bench: Workspace, dataset: Dataset, jobs: tuple[FoldJob, ...]) -> None:
    killed, other = jobs[0], jobs[2]

    def kill(statuses: Mapping[str, str]) -> None:
        if (killed.folder / "checkpoint_best.pth").exists():
            for process in trainings(killed):
                process.kill()

    errors = run_local([killed, other], ["cpu"], kill)
    assert list(errors) == [killed.name] and "exit status -9" in errors[killed.name]
    lost = other.folder / "validation" / f"{other.cases[0]}.npz"  # an interrupted validation
    lost.unlink()
    trained = files_in(other.folder, "checkpoint_final.pth")

    command = ["masksam", "benchmark", "-d", dataset.id, "--trainers", "ShortNNUNet", "ShortMaskSAM"]
    command += ["-f", 0, 1, "-device", "cpu", "-np", 1]
    told = bench.run(*command)
    assert "0 of 4 folds are done" in told and "mean over cases" in told
    page = Path(told.splitlines()[-1])
    assert page == bench.results / dataset.name / "benchmark_3d_fullres" / "report.html"
    assert len(trained) == 1 and files_in(other.folder, "checkpoint_final.pth") == trained and lost.is_file()
    log = killed.log.read_text()
    assert log.count("$ nnUNetv2_train") == 2 and log.count(": Epoch 0\n") == 1, "it was trained from its start"
    for job, expected in ((killed, ["train", "continue"]), (other, ["train", "validate"])):
        record = FoldRecord.read(job.folder)
        assert record is not None and [part.kind for part in record.parts] == expected
        compute = read_fold_compute(job.folder, History.read(job.folder / "checkpoint_final.pth"))
        assert (compute.resumed, compute.epochs, compute.iterations) == ("continue" in expected, EPOCHS, 2 * EPOCHS)
        assert compute.peak_memory_mib is not None and compute.peak_memory_mib > 200
        assert compute.seconds is not None and compute.wall_seconds is not None
        assert 0 < compute.seconds < compute.wall_seconds < 600
        # The checkpoint holds the optimizer's momentum too.
        assert compute.parameters is not None and "CPU cores" in compute.device
        assert compute.parameters * 4 < compute.checkpoint_bytes < compute.parameters * 10

    report = json.loads((page.parent / "report.json").read_text())
    kinds = [row["kind"] for row in report["rows"]]
    assert [kinds.count(kind) for kind in ("method", "ensemble", "postprocessed")] == [2, 1, 3]
    summary = bench.model(dataset.name, "ShortMaskSAM") / "crossval_results_folds_0_1" / "summary.json"
    theirs = json.loads(summary.read_text())["foreground_mean"]["Dice"]
    scores = pd.read_csv(page.parent / "scores.csv")
    dice = scores[(scores["method"] == "ShortMaskSAM") & (scores["metric"] == "dice")]
    assert dice.groupby("class")["value"].mean().mean() == pytest.approx(theirs, abs=1e-6)
    assert set(scores["case"]) == {case for job in jobs for case in job.cases}
    assert len({line[0] for line in report["test_set"]["data"]}) == 3, "two methods and their ensemble"
    assert sum("nnUNetv2_train" in line for line in report["commands"]) == 6
    text = page.read_text()
    assert 'id="inside"' in text and "could not be drawn" not in text
    assert "nnUNetv2_ensemble" in text and "ShortNNUNet + ShortMaskSAM" in text

    # Nothing that is done is done again, and what has changed is refused.
    kept = files_in(bench.results, "*.pth") | files_in(page.parent / "test_set", "*.nii.gz")
    splits = bench.preprocessed / dataset.name / "splits_final.json"
    before = splits.read_text()
    folds = json.loads(before)
    folds[1]["train"].reverse()
    splits.write_text(json.dumps(folds))
    stray = killed.folder / "validation" / "another_case.nii.gz"
    shutil.copy(next(stray.parent.glob("*.nii.gz")), stray)
    told = bench.run("masksam", "report", page.parent, fails=True)
    assert "splits_final.json" in told and "another_case" in told and "--accept-unfair" in told
    assert "Traceback" not in told
    stray.unlink()
    # One fold without ensembles and post-processing, as in the demo.
    shutil.rmtree(bench.raw / dataset.name / "labelsTs")
    changes = {"folds": (0,), "ensembles": False, "postprocessing": False}
    quick = bench.root / "quick"
    quick.mkdir()
    Benchmark.read(page.parent).model_copy(update=changes).write(quick)
    bench.run("masksam", "report", quick, "--accept-unfair")
    assert [row["kind"] for row in json.loads((quick / "report.json").read_text())["rows"]] == ["method", "method"]
    body = (quick / "report.html").read_text().partition("<body")[2]
    assert 0 < body.index("splits_final.json") < body.index("<table"), "the reason comes first"
    assert len(kept) == 4 * 2 + 3
    assert files_in(bench.results, "*.pth") | files_in(page.parent / "test_set", "*.nii.gz") == kept
    splits.write_text(before)


def test_the_first_steps_are_timed_and_leave_no_fold(jobs: tuple[FoldJob, ...], tmp_path: Path) -> None:
    mine = [replace(job, environment={**job.environment, "nnUNet_results": str(tmp_path)}) for job in jobs[:2]]
    assert step_seconds(mine) > 0
    assert len(list(tmp_path.glob("*/*/plans.json"))) == 2 and not any(job.folder.exists() for job in mine)


def test_first_steps_that_fail(jobs: tuple[FoldJob, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(jobs: object) -> float:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(demo, "_all_steps", fail)
    with pytest.raises(TrainingError, match="CUDA out of memory"):
        step_seconds(jobs)
