"""Folds trained with nnU-Net's own command, one killed in the middle and continued."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from nnunet_workspace import SHORT_TRAINERS, Dataset, Workspace

from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.folds import FoldRecord, read_fold_compute
from masksam_nnunet.benchmarks.jobs import FoldJob, run_local
from masksam_nnunet.environment import ext_trainer_value
from masksam_nnunet.inference.methods import parse_methods

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="kill -9")]
EPOCHS = 6


@pytest.fixture
def jobs(workspace: Workspace, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[FoldJob, ...]:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(workspace.root / f"nnUNet_{name}"))
    monkeypatch.setenv("nnUNet_extTrainer", ext_trainer_value(str(SHORT_TRAINERS)))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("TEST_MIRRORING", "0")
    monkeypatch.setenv("TEST_EPOCHS", str(EPOCHS))
    methods = parse_methods(["ShortNNUNet", "ShortMaskSAM"], [], "3d_fullres")
    benchmark = Benchmark(dataset=dataset.name, configuration="3d_fullres", methods=methods, folds=(0, 1), device="cpu")
    benchmark.check()
    return benchmark.jobs()[0::2]  # both folds of ShortNNUNet, with probabilities


def trainings(job: FoldJob) -> list[psutil.Process]:
    """Processes that train this fold."""
    words = {"nnUNetv2_train", job.method.trainer, str(job.fold)}
    return [p for p in psutil.process_iter(["cmdline"]) if words <= {*(p.info["cmdline"] or [])}]


def test_a_killed_fold_is_continued_and_done_folds_are_not_repeated(jobs: tuple[FoldJob, ...]) -> None:
    first, second = jobs
    killed: list[int] = []

    def kill_once(statuses: Mapping[str, str]) -> None:
        if not killed and (first.folder / "checkpoint_best.pth").exists():
            for process in trainings(first):
                killed.append(process.pid)
                process.kill()

    errors = run_local(jobs, ["cpu"], kill_once)
    assert len(killed) == 1 and list(errors) == [first.name] and "exit status -9" in errors[first.name]
    assert not (first.folder / "checkpoint_final.pth").exists()
    done = {path: path.stat().st_mtime_ns for path in second.folder.rglob("*") if path.suffix in (".pth", ".gz")}
    assert len(done) == 4  # two checkpoints, two cases

    assert not run_local(jobs, ["cpu"])
    assert {path: path.stat().st_mtime_ns for path in done} == done
    record = FoldRecord.read(first.folder)
    assert record is not None
    assert [(part.kind, part.exit_status) for part in record.parts] == [("train", -9), ("continue", 0)]
    assert record.parts[1].command.startswith("nnUNetv2_train Dataset") and "--c" in record.parts[1].command
    log = first.log.read_text()
    assert log.count("$ nnUNetv2_train") == 2 and log.count(": Epoch 0\n") == 1, "it was trained from its start"
    for job, resumed in ((first, 1), (second, 0)):
        compute = read_fold_compute(job.folder)
        assert (compute.resumed, compute.epochs, compute.iterations) == (resumed, EPOCHS, 2 * EPOCHS)
        assert compute.seconds is not None and 0 < compute.seconds < 600
        assert compute.peak_memory_mib is not None and compute.peak_memory_mib > 200
        assert compute.wall_seconds is not None and compute.wall_seconds > compute.seconds
        assert compute.parameters is not None and "CPU cores" in compute.device
        # The checkpoint holds the optimizer's momentum too.
        assert compute.parameters * 4 < compute.checkpoint_bytes < compute.parameters * 10


def test_a_validation_that_was_interrupted_is_completed(jobs: tuple[FoldJob, ...]) -> None:
    """After the test above: the second fold is trained."""
    job = jobs[1]
    if not (job.folder / "checkpoint_final.pth").exists():
        pytest.skip("needs the test above")
    trained = (job.folder / "checkpoint_final.pth").stat().st_mtime_ns
    lost = Path(job.folder / "validation" / f"{job.cases[0]}.npz")
    lost.unlink()
    assert not run_local([job], ["cpu"]) and lost.is_file()
    assert (job.folder / "checkpoint_final.pth").stat().st_mtime_ns == trained
    record = FoldRecord.read(job.folder)
    assert record is not None and [part.kind for part in record.parts] == ["train", "validate"]
