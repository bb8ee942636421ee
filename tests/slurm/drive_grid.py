"""Submit the grid to the SLURM that is up, break three jobs off, and check what comes of it; called by run.sh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from nnunet_workspace import SHARED, SHORT_TRAINERS, Workspace, copy_small
from rich.console import Console

from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.folds import FoldRecord, Stage, read_fold_compute
from masksam_nnunet.benchmarks.jobs import FoldJob
from masksam_nnunet.benchmarks.progress import Progress
from masksam_nnunet.benchmarks.slurm import Slurm, SlurmSettings, Submission, jobs_in_queue
from masksam_nnunet.environment import ext_trainer_value
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.methods import parse_methods
from masksam_nnunet.inference.phantoms import write_phantom_dataset

CASES, EPOCHS = 10, 6
DATASET = "Dataset004_Small"


def prepare(root: Path) -> None:
    """A small dataset, planned and preprocessed, and nnU-Net's variables."""
    workspace = Workspace(root)
    source = SHARED / "Dataset004_Hippocampus"
    if not source.is_dir():
        source = write_phantom_dataset(root / "phantoms", num_cases=CASES)
    copy_small(source, workspace.raw / DATASET, CASES)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 1)
    workspace.set_batch_size(DATASET, 2)
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(root / f"nnUNet_{name}")
    os.environ["nnUNet_extTrainer"] = ext_trainer_value(str(SHORT_TRAINERS))
    os.environ |= {"nnUNet_def_n_proc": "1", "TEST_EPOCHS": str(EPOCHS), "TEST_MIRRORING": "0"}
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait must not keep jobs beside them from working


class Disturbance:
    """Breaks each of some jobs off once, when its training has a checkpoint, in a way of its own."""

    def __init__(self, ways: Mapping[str, Callable[[FoldJob, str], None]], jobs: tuple[FoldJob, ...]) -> None:
        self.ways = dict(ways)
        self.jobs = {job.name: job for job in jobs}
        self.numbers: Mapping[str, str] = {}

    def look(self, statuses: Mapping[str, str]) -> None:
        for name in list(self.ways):
            job = self.jobs[name]
            begun = (job.folder / "checkpoint_best.pth").exists()
            if begun and not (job.folder / "checkpoint_final.pth").exists() and training(job):
                self.ways.pop(name)(job, self.numbers[name])


def training(job: FoldJob) -> list[psutil.Process]:
    """Processes that train this fold."""
    words = ["nnUNetv2_train", job.dataset, job.method.configuration, str(job.fold), "-tr", job.method.trainer]
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if " ".join(words) in " ".join(p.info["cmdline"] or [])]


def preempt(job: FoldJob, number: str) -> None:
    tell(f"{job.name}: scancel --signal=USR2 {number}, as SLURM before it pre-empts or at the end of the time")
    subprocess.run(["scancel", "--signal=USR2", number], check=True)


def terminate(job: FoldJob, number: str) -> None:
    tell(f"{job.name}: scancel --signal=TERM {number}, as SLURM when it pre-empts with a time of grace")
    subprocess.run(["scancel", "--signal=TERM", number], check=True)  # to the steps, as pre-emption does


def requeue(job: FoldJob, number: str) -> None:
    tell(f"{job.name}: scontrol requeue {number}, as SLURM does when a node fails")
    subprocess.run(["scontrol", "requeue", number], check=True)


def kill(job: FoldJob, number: str) -> None:
    tell(f"{job.name}: kill -9 of the training process, as when memory is short")
    for process in training(job):
        process.send_signal(signal.SIGKILL)


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def orphans(jobs: tuple[FoldJob, ...]) -> list[int]:
    return [process.pid for job in jobs for process in training(job)]


def main(root: Path) -> None:
    began = time.monotonic()
    tell("planning and preprocessing")
    prepare(root)
    benchmark = Benchmark(
        dataset=DATASET,
        configuration="3d_fullres",
        methods=parse_methods(["ShortNNUNet", "ShortMaskSAM"], [], "3d_fullres"),
        folds=(0, 1, 2, 3, 4),
        device="cpu",
        processes=1,
    )
    for note in benchmark.check():
        tell(note)
    jobs, environment = benchmark.jobs(), benchmark.environment()
    cluster = Slurm(root / "benchmark", SlurmSettings(partition="main", minutes=30, gpus=0, cpus=1))
    refused = Slurm(root / "refused", SlurmSettings(partition="nowhere", minutes=30, gpus=0, cpus=1))
    try:
        refused.submit(jobs[:1], environment)
        raise AssertionError("a partition that does not exist was taken")
    except TrainingError as error:
        tell(f"as it should be: {error}")

    result = root / "benchmark" / "report.html"
    benchmark.write(root / "benchmark")
    names = [job.name for job in jobs]
    ways = {names[0]: preempt, names[2]: terminate, names[3]: requeue, names[4]: kill}
    disturbance = Disturbance(ways, jobs)

    submission, new = cluster.submit(jobs, environment)
    tell(f"submitted {len(new)} folds, evaluation is job {submission.evaluation}")
    print(subprocess.run(["squeue"], capture_output=True, text=True).stdout, flush=True)
    disturbance.numbers = submission.folds
    assert cluster.submit(jobs, environment) == (submission, [])
    tell("a second submission while all are queued submits nothing")
    errors = wait(cluster, jobs, submission, disturbance)
    assert not disturbance.ways, f"not broken off: {list(disturbance.ways)}"
    tell(f"the first run has ended; failed:\n{errors}")
    assert list(errors) == [names[4], "evaluation"]
    assert "not all folds are done" in errors["evaluation"] and not result.exists()
    assert not orphans(jobs), "training processes are left"

    unfinished = tuple(job for job in jobs if job.state().stage is not Stage.DONE)
    assert [job.name for job in unfinished] == [names[4]]
    told = by_command(root / "benchmark")
    assert result.is_file() and told.splitlines()[-1] == str(result)
    check(jobs, {names[index] for index in (0, 2, 3, 4)})
    report = read_json(result.with_suffix(".json"))
    tell(f"report of {', '.join(row['name'] for row in report['rows'])}: {result.stat().st_size} bytes")
    tell(f"complete: 10 folds, 4 of them broken off and gone on with, in {time.monotonic() - began:.0f} s")


def by_command(out: Path) -> str:
    """The rest by the command itself, which waits for SLURM; its standard output."""
    words = ["masksam", "benchmark", "-d", "4", "--trainers", "ShortNNUNet", "ShortMaskSAM", "--devices", "cpu"]
    words += ["--out", str(out), "-np", "1", "--executor", "slurm", "--wait", "--partition", "main"]
    words += ["--hours", "0.5", "--cpus", "1"]
    tell(shlex.join(words))
    words[0] = str(Path(sys.executable).parent / words[0])
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"exit status {done.returncode}"
    assert "9 of 10 folds are done, 1 to train or finish" in done.stdout and "submitted 1 jobs" in done.stdout
    return done.stdout


def wait(cluster: Slurm, jobs: tuple[FoldJob, ...], submission: Submission, disturbance: Disturbance) -> dict[str, str]:
    with Progress(Console(width=160), jobs) as progress:

        def look(statuses: Mapping[str, Any]) -> None:
            progress.show(statuses)
            disturbance.look(statuses)

        errors = cluster.wait(submission, look)
    assert not set(submission.folds.values()) & set(jobs_in_queue())
    return errors


def check(jobs: tuple[FoldJob, ...], broken_off: set[str]) -> None:
    """Every fold is done, none was trained twice from scratch, and the records say who went on."""
    for job in jobs:
        assert job.state().stage is Stage.DONE, job.state()
        record = FoldRecord.read(job.folder)
        assert record is not None
        expected = ["train", "continue"] if job.name in broken_off else ["train"]
        kinds = [part.kind for part in record.parts]
        assert kinds == expected, f"{job.name}: {kinds}"
        compute = read_fold_compute(job.folder)
        assert compute.resumed == len(expected) - 1
        assert (compute.epochs, compute.iterations) == (EPOCHS, 2 * EPOCHS), compute
        log = job.log.read_text()
        assert log.count(": Epoch 0\n") == 1, f"{job.name} was trained twice from scratch"
        codes = [part.exit_status for part in record.parts]
        tell(f"{job.name}: {kinds}, exit {codes}, {compute.seconds:.1f} s of training")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
