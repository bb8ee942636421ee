"""The grid trained with nnU-Net's own command, one fold killed in the middle and gone on with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from nnunet_workspace import SHORT_TRAINERS, Dataset, Workspace

from masksam_nnunet.benchmarks.executors import Status, failures
from masksam_nnunet.benchmarks.fold_record import PROCESS_FILE, FoldRecord, read_fold_compute
from masksam_nnunet.benchmarks.grid import Grid, check_grid, grid_jobs
from masksam_nnunet.benchmarks.local_jobs import LocalGrid
from masksam_nnunet.benchmarks.train_fold import FoldJob
from masksam_nnunet.environment import ext_trainer_value
from masksam_nnunet.inference.methods import parse_methods

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="submitit and kill -9"),
]
EPOCHS = 6


@pytest.fixture()
def jobs(workspace: Workspace, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[FoldJob, ...]:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(workspace.root / f"nnUNet_{name}"))
    monkeypatch.setenv("nnUNet_extTrainer", ext_trainer_value(str(SHORT_TRAINERS)))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("TEST_MIRRORING", "0")
    monkeypatch.setenv("TEST_EPOCHS", str(EPOCHS))
    methods = parse_methods(["ShortNNUNet"], [], "3d_fullres")
    grid = Grid(dataset.name, "3d_fullres", methods, (0, 1), device="cpu")
    check_grid(grid)
    return grid_jobs(grid)


def trainings(job: FoldJob) -> list[psutil.Process]:
    """Processes that train this fold."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(job.folder / PROCESS_FILE) in (process.info["cmdline"] or []):
            found.append(process)
    return found


def test_a_killed_fold_goes_on_and_done_folds_are_not_repeated(jobs: tuple[FoldJob, ...], tmp_path: Path) -> None:
    first, second = jobs
    killed: list[int] = []

    def kill_once(statuses: Mapping[str, Status]) -> None:
        if killed or not (first.folder / "checkpoint_best.pth").exists():
            return
        for process in trainings(first):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed.append(process.pid)

    outcomes = LocalGrid(tmp_path, ["cpu"]).run(jobs, watch=kill_once)
    assert len(killed) == 1
    assert [outcome.error is None for outcome in outcomes] == [False, True], failures(outcomes)
    assert "exit status -9" in (outcomes[0].error or "")
    assert not (first.folder / "checkpoint_final.pth").exists()
    done = {path: path.stat().st_mtime_ns for path in second.folder.rglob("*") if path.suffix in (".pth", ".gz")}
    assert len(done) == 4  # two checkpoints, two cases

    outcomes = LocalGrid(tmp_path, ["cpu"]).run(jobs)
    assert not failures(outcomes)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    record = FoldRecord.read(first.folder)
    assert record is not None
    assert [(part["kind"], part["exit_status"]) for part in record.parts] == [("train", -9), ("continue", 0)]
    assert record.parts[1]["command"].startswith("nnUNetv2_train Dataset") and "--c" in record.parts[1]["command"]
    log = first.log.read_text()
    assert log.count("$ nnUNetv2_train") == 2 and log.count(": Epoch 0\n") == 1, "it began anew"
    for job, resumed in ((first, 1), (second, 0)):
        compute = read_fold_compute(job.folder)
        assert (compute.resumed, compute.epochs, compute.iterations) == (resumed, EPOCHS, 2 * EPOCHS)
        assert compute.seconds is not None and 0 < compute.seconds < 600
        assert compute.peak_memory_mib is not None and compute.peak_memory_mib > 200
        assert compute.parameters == compute.trainable_parameters and compute.parameters is not None
        assert "CPU cores" in compute.device and compute.checkpoint_bytes > compute.parameters * 4


def test_a_validation_that_was_broken_off_is_made_up_for(jobs: tuple[FoldJob, ...], tmp_path: Path) -> None:
    """After the test above: the second fold is trained."""
    job = jobs[1]
    if not (job.folder / "checkpoint_final.pth").exists():
        pytest.skip("needs the test above")
    trained = (job.folder / "checkpoint_final.pth").stat().st_mtime_ns
    lost = job.folder / "validation" / f"{job.cases[0]}.npz"
    lost.unlink()
    (outcome,) = LocalGrid(tmp_path, ["cpu"]).run([job])
    assert outcome.error is None and lost.is_file()
    assert (job.folder / "checkpoint_final.pth").stat().st_mtime_ns == trained
    record = FoldRecord.read(job.folder)
    assert record is not None and [part["kind"] for part in record.parts] == ["train", "validate"]
