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

import psutil
from nnunet_workspace import SHARED, SHORT_TRAINERS, Workspace, copy_small
from rich.console import Console

from masksam_nnunet.benchmarks.executors import Outcome, Status, failures
from masksam_nnunet.benchmarks.fold_record import PROCESS_FILE, FoldRecord, read_fold_compute
from masksam_nnunet.benchmarks.fold_state import Stage
from masksam_nnunet.benchmarks.grid import Grid, check_grid, grid_jobs
from masksam_nnunet.benchmarks.progress import GridProgress
from masksam_nnunet.benchmarks.report_job import ReportJob
from masksam_nnunet.benchmarks.run import Definition
from masksam_nnunet.benchmarks.slurm_jobs import SlurmGrid, SlurmSettings, Submission, jobs_in_queue
from masksam_nnunet.benchmarks.train_fold import FoldJob
from masksam_nnunet.environment import ext_trainer_value
from masksam_nnunet.errors import BenchmarkError
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

    def look(self, statuses: Mapping[str, Status]) -> None:
        for name in list(self.ways):
            job = self.jobs[name]
            begun = (job.folder / "checkpoint_best.pth").exists() and (job.folder / PROCESS_FILE).exists()
            if begun and not (job.folder / "checkpoint_final.pth").exists() and training(job):
                self.ways.pop(name)(job, self.numbers[name])


def training(job: FoldJob) -> list[psutil.Process]:
    mark = str(job.folder / PROCESS_FILE)
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


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
    methods = parse_methods(["ShortNNUNet", "ShortMaskSAM"], [], "3d_fullres")
    grid = Grid(DATASET, "3d_fullres", methods, (0, 1, 2, 3, 4), device="cpu")
    for note in check_grid(grid):
        tell(note)
    jobs = grid_jobs(grid)
    cluster = SlurmGrid(root / "benchmark", SlurmSettings(partition="main", minutes=30, gpus=0, cpus=1))
    refused = SlurmGrid(root / "refused", SlurmSettings(partition="nowhere", minutes=30, gpus=0, cpus=1))
    try:
        refused.submit(jobs[:1])
        raise AssertionError("a partition that does not exist was taken")
    except BenchmarkError as error:
        tell(f"as it should be: {error}")

    result = root / "benchmark" / "report.html"
    Definition(grid, processes=1).write(root / "benchmark")
    evaluation = ReportJob(root / "benchmark")
    names = [job.name for job in jobs]
    ways = {names[0]: preempt, names[2]: terminate, names[3]: requeue, names[4]: kill}
    disturbance = Disturbance(ways, jobs)

    submission = submit(cluster, jobs, evaluation)
    disturbance.numbers = submission.folds
    again = cluster.submit(jobs, evaluation)
    assert again.new == () and again.folds == submission.folds and again.evaluation == submission.evaluation
    tell("a second submission while all are queued submits nothing")
    outcomes = wait(cluster, jobs, submission, disturbance)
    assert not disturbance.ways, f"not broken off: {list(disturbance.ways)}"
    tell(f"the first run has ended; failed:\n{failures(outcomes)}")
    assert [outcome.name for outcome in outcomes if outcome.error] == [names[4]]
    told = cluster.evaluation_error(submission)
    assert told is not None and "not all folds are done" in told and not result.exists()
    tell(f"the evaluation refused: {told}")
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


def submit(cluster: SlurmGrid, jobs: tuple[FoldJob, ...], evaluation: Callable[[], object]) -> Submission:
    submission = cluster.submit(jobs, evaluation)
    tell(f"submitted {len(submission.new)} folds, evaluation is job {submission.evaluation}")
    print(subprocess.run(["squeue"], capture_output=True, text=True).stdout, flush=True)
    return submission


def wait(
    cluster: SlurmGrid, jobs: tuple[FoldJob, ...], submission: Submission, disturbance: Disturbance
) -> tuple[Outcome, ...]:
    with GridProgress(Console(width=160), jobs) as progress:

        def look(statuses: Mapping[str, Status]) -> None:
            progress.show(statuses)
            disturbance.look(statuses)

        outcomes = cluster.wait(jobs, submission, look)
    assert not set(submission.folds.values()) & set(jobs_in_queue())
    return outcomes


def check(jobs: tuple[FoldJob, ...], broken_off: set[str]) -> None:
    """Every fold is done, none was trained twice from scratch, and the records say who went on."""
    for job in jobs:
        assert job.state().stage is Stage.DONE, job.state()
        record = FoldRecord.read(job.folder)
        assert record is not None
        expected = ["train", "continue"] if job.name in broken_off else ["train"]
        kinds = [part["kind"] for part in record.parts]
        assert kinds == expected, f"{job.name}: {kinds}"
        assert record.resumed == len(expected) - 1
        compute = read_fold_compute(job.folder)
        assert (compute.epochs, compute.iterations) == (EPOCHS, 2 * EPOCHS), compute
        log = job.log.read_text()
        assert log.count(": Epoch 0\n") == 1, f"{job.name} was trained twice from scratch"
        codes = [part["exit_status"] for part in record.parts]
        tell(f"{job.name}: {kinds}, exit {codes}, resumed {record.resumed}, {compute.seconds:.1f} s of training")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
