"""Running a grid's jobs here, the file of submitted jobs, and what SLURM is asked for."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from simple_jobs import SimpleJob
from submitit.helpers import DelayedSubmission

from masksam_nnunet.benchmarks import fold_record, local_jobs, slurm_jobs
from masksam_nnunet.benchmarks.commands import CommandError, run_logged
from masksam_nnunet.benchmarks.executors import Status, failures
from masksam_nnunet.benchmarks.fold_record import PROCESS_FILE, FoldRecord, Inputs, read_fold_compute
from masksam_nnunet.benchmarks.job_file import SubmittedJobs
from masksam_nnunet.benchmarks.local_jobs import LocalGrid
from masksam_nnunet.benchmarks.progress import GridProgress, fold_progress
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.benchmarks.slurm_jobs import SlurmGrid, SlurmSettings, parse_slurm_options
from masksam_nnunet.benchmarks.train_fold import FoldJob, preemption_signal
from masksam_nnunet.errors import BenchmarkError

METHOD = Method("T", "P", "3d_fullres")


@pytest.fixture()
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of jobs find the helpers of tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.mark.usefixtures("importable")
def test_one_failing_fold_stops_no_other(tmp_path: Path) -> None:
    jobs = [
        SimpleJob(tmp_path, "a", seconds=0.3),
        SimpleJob(tmp_path, "b", fails=True),
        SimpleJob(tmp_path, "c", seconds=0.3),
    ]
    seen: list[Mapping[str, Status]] = []
    evaluated: list[bool] = []
    outcomes = LocalGrid(tmp_path / "jobs", ["cpu"]).run(
        jobs, evaluate=lambda: evaluated.append(True), watch=lambda statuses: seen.append(dict(statuses))
    )
    assert [(o.name, o.error) for o in outcomes] == [("a", None), ("b", "b has no data"), ("c", None)]
    assert "b failed" in failures(outcomes) and "a failed" not in failures(outcomes)
    assert evaluated == [True]
    assert list(seen[-1].values()) == [Status.DONE, Status.FAILED, Status.DONE]
    assert all(list(statuses.values()).count(Status.RUNNING) <= 1 for statuses in seen)
    spans = [tuple(map(float, (tmp_path / name).read_text().split())) for name in ("a", "c")]
    assert spans[0][1] < spans[1][0]  # in turn on one device


@pytest.mark.usefixtures("importable")
def test_jobs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    jobs = [SimpleJob(tmp_path, "long", seconds=60)]
    numbers: list[int] = []

    def interrupt(statuses: Mapping[str, Status]) -> None:
        if (tmp_path / "long_began").exists():
            stdout = list((tmp_path / "jobs").glob("*/*_log.out"))
            numbers.append(int(stdout[0].name.split("_")[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalGrid(tmp_path / "jobs", ["cpu"]).run(jobs, watch=interrupt)
    state = subprocess.run(["ps", "-p", str(numbers[0]), "-o", "stat="], capture_output=True).stdout
    assert state == b"" or state.startswith(b"Z")
    assert not (tmp_path / "long").exists()


RUNS_A_LONG_JOB = """
import sys
from pathlib import Path
from simple_jobs import SimpleJob
from masksam_nnunet.benchmarks.local_jobs import LocalGrid
folder = Path(sys.argv[1])
LocalGrid(folder / "jobs", ["cpu"]).run([SimpleJob(folder, "long", seconds=100, saves=3)])
"""


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.1)


@pytest.mark.usefixtures("importable")
def test_a_terminals_interrupt_leaves_jobs_the_time_to_save(tmp_path: Path) -> None:
    """It reaches every process of the group, submitit's controller too, which would kill the job after a second."""
    # As in a terminal, however pytest was started: in a script's background SIGINT is ignored, and children inherit it.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", heeds + RUNS_A_LONG_JOB, str(tmp_path)]
    owner = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "long_began")
    os.killpg(owner.pid, signal.SIGINT)
    told = owner.communicate(timeout=60)[1]
    assert owner.returncode != 0 and (tmp_path / "long_saved").exists() and not (tmp_path / "long").exists()
    assert told.count("KeyboardInterrupt") == 1, told  # the owner's own


@pytest.mark.usefixtures("importable")
def test_jobs_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """In the background of a script, where a shell has SIGINT ignored."""
    script = f"{shlex.quote(sys.executable)} -c '{RUNS_A_LONG_JOB}' {shlex.quote(str(tmp_path))} & echo $!; wait"
    shell = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    owner = int(shell.stdout.readline())
    wait_for(tmp_path / "long_began")
    os.kill(owner, signal.SIGKILL)
    shell.wait()
    wait_for(tmp_path / "long_saved")
    assert not (tmp_path / "long").exists()


@pytest.mark.usefixtures("importable")
def test_a_job_that_cannot_be_started_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [SimpleJob(tmp_path, "a"), SimpleJob(tmp_path, "b")]
    submit = local_jobs.LocalExecutor.submit

    def full_disk_at_first(executor: Any, job: Any) -> Any:
        monkeypatch.setattr(local_jobs.LocalExecutor, "submit", submit)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_jobs.LocalExecutor, "submit", full_disk_at_first)
    first, second = LocalGrid(tmp_path / "jobs", ["cpu"]).run(jobs)
    assert first.error is not None and "No space left" in first.error and "run again" in first.error
    assert second.error is None


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cpu", "3,5", None), ("1", "3,5", "5"), ("cuda", "GPU-a, GPU-b", "GPU-a"), ("1", "", "1"), ("cuda", None, "0")],
)
def test_gpus_count_among_those_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_jobs.gpu_name(device) == expected


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BenchmarkError, match="--devices 0 1: PyTorch sees 1 GPUs"):
        LocalGrid(tmp_path, ["0", "1"])


# ---- the child process -----------------------------------------------------------------------------------------------


def test_a_failing_command_tells_its_status_and_the_log_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_logged("first", [sys.executable, "-c", "print('one')"], os.environ, log)
    with pytest.raises(CommandError, match="two") as caught:
        run_logged("second", [sys.executable, "-c", "print('two'); exit(3)"], os.environ, log)
    assert caught.value.code == 3
    assert log.read_text().split("\n")[:4] == ["$ first", "one", "$ second", "two"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="submitit's signal is of Unix")
def test_the_training_does_not_see_submitits_signal(tmp_path: Path) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    log = tmp_path / "log"
    run_logged("x", [sys.executable, "-c", program], os.environ, log, shielded_from=[preemption_signal()])
    assert "alive" in log.read_text()
    with pytest.raises(CommandError):
        run_logged("x", [sys.executable, "-c", program], os.environ, log)
    assert preemption_signal() not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_training_ends_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    """As after kill -9 of the process that waits for it: nobody would know of it any more."""
    waits = (
        "import subprocess, sys, os, time\n"
        "child = 'import time, pathlib, sys; from masksam_nnunet.benchmarks.nnunet_process import Witness;'"
        "\nchild += f'Witness(pathlib.Path(\"x\"), {os.getpid()}).start(); print(1, flush=True); time.sleep(60)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\nprint(p.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")")[-1].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.2)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the training went on without its parent")


# ---- the record ------------------------------------------------------------------------------------------------------


def write_log(fold: Path, epochs: int) -> None:
    fold.mkdir(parents=True, exist_ok=True)
    log = {
        "epoch_start_timestamps": [100.0 * n for n in range(epochs)],
        "epoch_end_timestamps": [100.0 * n + 7 for n in range(epochs)],
    }
    torch.save({"network_weights": {}, "logging": log}, fold / "checkpoint_final.pth")


def test_compute_is_added_up_over_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["abc", "def", "def"])
    monkeypatch.setattr(fold_record, "git_hash", lambda: next(commits))
    monkeypatch.setattr(fold_record, "versions", lambda: {"torch": "2.9"})
    fold = tmp_path / "fold_3"
    write_log(fold, epochs=4)
    inputs = Inputs("s", "p", "d")
    record = FoldRecord(fold, "T", "P", "3d_fullres", None, inputs, git_hash="abc", versions={"torch": "2.8"})
    told = {"device": "A GPU", "peak_memory_of": "GPU allocations", "parameters": 9, "trainable_parameters": 4}
    variables = {"MASKSAM_SLICES_AT_ONCE": "4", "nnUNet_raw": "raw", "HOME": "home"}
    for kind, peak in (("train", 700.0), ("continue", 500.0), ("validate", 900.0)):
        record.begin_part(kind, "nnUNetv2_train ...", variables)  # type: ignore[arg-type]
        of_part = {"peak_memory_mib": peak, "iterations_per_epoch": 250, "wall_seconds": 30.0}
        (fold / PROCESS_FILE).write_text(json.dumps({**told, **of_part}))
        if kind != "train":  # the first was killed together with the benchmark
            record.end_part(0)
        record = FoldRecord.read(fold)  # type: ignore[assignment]
    compute = read_fold_compute(fold)
    assert (compute.fold, compute.resumed, compute.git_hash) == (3, 1, "abc then def")
    assert compute.wall_seconds == 60.0  # of the parts that trained: more than the 28 seconds in nnU-Net's log
    assert record.all_versions() == {"torch": "2.8 then 2.9"}
    assert record.parts[1]["variables"] == {"MASKSAM_SLICES_AT_ONCE": "4"}
    assert (compute.seconds, compute.epochs, compute.iterations) == (28.0, 4, 1000)
    assert (compute.peak_memory_mib, compute.device) == (700.0, "A GPU")
    assert (compute.parameters, compute.trainable_parameters) == (9, 4)
    assert compute.checkpoint_bytes == (fold / "checkpoint_final.pth").stat().st_size
    assert record.parts[0]["process"]["peak_memory_mib"] == 700.0 and record.parts[0]["end"] is None


def test_compute_counts_the_training_that_was_kept_on_all_its_devices(tmp_path: Path) -> None:
    fold = tmp_path / "fold_0"
    write_log(fold, epochs=2)
    record = FoldRecord(fold, "T", "P", "3d_fullres", None, Inputs("s", "p", "d"), git_hash=None)
    for kind, device, peak in (("train", "V100", 900.0), ("train", "A100", 5.0), ("continue", "V100", 6.0)):
        record.begin_part(kind, "nnUNetv2_train ...", {})  # type: ignore[arg-type]
        (fold / PROCESS_FILE).write_text(json.dumps({"device": device, "peak_memory_mib": peak}))
        record.end_part(0)
    compute = read_fold_compute(fold)
    assert (compute.peak_memory_mib, compute.resumed, compute.device) == (6.0, 1, "A100 and V100")


def test_a_fold_trained_elsewhere_has_what_its_log_says(tmp_path: Path) -> None:
    write_log(tmp_path / "fold_0", epochs=2)
    compute = read_fold_compute(tmp_path / "fold_0")
    assert (compute.seconds, compute.epochs) == (14.0, 2)
    assert compute.peak_memory_mib is compute.parameters is compute.iterations is compute.git_hash is None
    with pytest.raises(BenchmarkError, match="not trained"):
        read_fold_compute(tmp_path / "fold_1")


def test_a_time_budgets_own_figures_count(tmp_path: Path) -> None:
    write_log(tmp_path / "fold_0", epochs=2)
    stats = {"train_seconds": 180.5, "iterations": 77, "peak_memory_mb": 5.0, "peak_memory_of": "process, resident"}
    (tmp_path / "fold_0" / "training_stats.json").write_text(json.dumps(stats))
    compute = read_fold_compute(tmp_path / "fold_0")
    assert (compute.seconds, compute.iterations, compute.peak_memory_mib) == (180.5, 77, 5.0)


def test_an_unreadable_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "benchmark_run.json").write_text("{")
    with pytest.raises(BenchmarkError, match=r"benchmark_run.json is not a benchmark's record"):
        FoldRecord.read(tmp_path)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def fold_job(tmp_path: Path) -> FoldJob:
    environment = {f"nnUNet_{name}": str(tmp_path / name) for name in ("preprocessed", "results")}
    job = FoldJob("D", METHOD, 0, "cpu", environment)
    job.folder.mkdir(parents=True)
    (tmp_path / "preprocessed" / "D").mkdir(parents=True)
    (tmp_path / "preprocessed" / "D" / "splits_final.json").write_text('[{"train": ["a"], "val": ["b", "c"]}]')
    return job


@pytest.mark.parametrize("free", [3 * 2**20, 2**40])
def test_a_training_that_fails_on_a_full_disk_tells(
    fold_job: FoldJob, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Its log may have no room for that."""
    preprocessed = Path(fold_job.environment["nnUNet_preprocessed"]) / "D"
    (preprocessed / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    (preprocessed / f"{METHOD.plans}.json").write_text("{}")
    usage = shutil.disk_usage(preprocessed)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    def fails(*arguments: Any, **options: Any) -> None:
        raise CommandError("nnUNetv2_train failed", 1)

    monkeypatch.setattr("masksam_nnunet.benchmarks.train_fold.run_logged", fails)
    with pytest.raises(BenchmarkError, match="nnUNetv2_train failed") as caught:
        fold_job()
    assert (f"Only 3 MiB are free where {fold_job.folder} is: make room" in str(caught.value)) is (free < 2**30)


def test_how_far_a_fold_is(fold_job: FoldJob) -> None:
    assert fold_progress(fold_job).text == "starting"
    fold_job.log.write_text("2024: Epoch 0 \nx\n2024: Epoch 4 \nEpoch time: 3 s\n")
    assert fold_progress(fold_job).text == "epoch 5"
    (fold_job.folder / PROCESS_FILE).write_text('{"epochs_planned": 8}')
    half = fold_progress(fold_job)
    assert half.text == "epoch 5 of 8" and half.fraction == pytest.approx(0.95 / 2)
    (fold_job.folder / "budget_progress.json").write_text('{"fraction": 0.1, "iterations": 12}')
    assert fold_progress(fold_job).text == "12 iterations"
    (fold_job.folder / "checkpoint_final.pth").touch()
    (fold_job.folder / "validation").mkdir()
    for name in ("b.nii.gz", "b.npz", "b.pkl"):
        (fold_job.folder / "validation" / name).touch()
    assert fold_progress(fold_job).text == "validation, 1 of 2 cases"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_the_grid_is_told(fold_job: FoldJob, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150)
    with GridProgress(console, [fold_job]) as progress:
        for status in (Status.WAITING, Status.RUNNING, Status.RUNNING, Status.DONE):
            progress.show({fold_job.name: status})
    told = out.getvalue()
    assert told.count(f"{fold_job.name}: running") == 1
    assert f"{fold_job.name}: done (1 of 1 folds have ended)" in told
    assert ("all folds" in told) is terminal


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def test_the_job_file_remembers(tmp_path: Path) -> None:
    with SubmittedJobs.opened(tmp_path) as jobs:
        jobs.folds["a"] = "17"
        jobs.write()
        with pytest.raises(BenchmarkError, match="another masksam benchmark"), SubmittedJobs.opened(tmp_path):
            pass
    with SubmittedJobs.opened(tmp_path) as jobs:
        assert (jobs.folds, jobs.evaluation) == ({"a": "17"}, None)
    (tmp_path / "jobs.json").write_text("[]")
    with pytest.raises(BenchmarkError, match=r"jobs.json is not readable"), SubmittedJobs.opened(tmp_path):
        pass


def test_slurm_options_are_read() -> None:
    assert parse_slurm_options(["account=lab", "--mail-type=END", "constraint=a=b"]) == {
        "account": "lab",
        "mail_type": "END",
        "constraint": "a=b",
    }


@pytest.mark.parametrize("text", ["", "=x", "account=", "dependency=afterok:1", "open-mode=append"])
def test_wrong_slurm_options(text: str) -> None:
    with pytest.raises(BenchmarkError, match="--slurm"):
        parse_slurm_options([text])


def test_no_slurm_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"--executor slurm: .*srun.*--executor local"):
        SlurmGrid(tmp_path, SlurmSettings())


@pytest.fixture()
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of shell scripts: sbatch counts, and refuses from the job that REFUSE_FROM names; nothing runs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    sbatch = f"""
    n=$(cat {programs}/count 2>/dev/null || echo 0)
    if [ "$n" -ge "${{REFUSE_FROM:-99}}" ]; then echo 'sbatch: error: invalid partition' >&2; exit 1; fi
    echo $((n + 1)) > {programs}/count; cp "$1" {state}/$((100 + n)); echo "Submitted batch job $((100 + n))"
    """
    for name, text in (
        ("sbatch", sbatch),
        ("srun", ""),
        ("squeue", f'for n in $(ls {state}); do echo "$n|PENDING"; done'),
        ("scancel", f"rm {state}/$1"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return state


def test_a_second_run_submits_only_what_is_not_queued(tmp_path: Path, slurm: Path) -> None:
    jobs = [SimpleJob(tmp_path, "m/fold_0"), SimpleJob(tmp_path, "m/fold_1")]
    settings = SlurmSettings("gpu", minutes=90, gpus=2, cpus=6, memory_gb=1.5, options={"account": "lab"})
    first = SlurmGrid(tmp_path / "out", settings).submit(jobs, evaluate=SimpleJob(tmp_path, "e"))
    assert (first.new, first.evaluation) == (("m/fold_0", "m/fold_1"), "102")
    script = (slurm / "100").read_text()
    for option in (
        "--partition=gpu",
        "--time=90",
        "--gpus-per-node=2",
        "--cpus-per-task=6",
        "--mem=1536M",
        "--account=lab",
        "--requeue",
        "--job-name=m_fold_0",
        "--signal=USR2@90",
    ):
        assert f"#SBATCH {option}\n" in script, option
    assert "--dependency=afterany:100:101" in (slurm / "102").read_text()
    again = SlurmGrid(tmp_path / "out", settings).submit(jobs, evaluate=SimpleJob(tmp_path, "e"))
    assert (again.new, again.folds, again.evaluation) == ((), first.folds, "102")

    (slurm / "100").unlink()  # one has ended, without success: it comes again, and the evaluation after it
    third = SlurmGrid(tmp_path / "out", settings).submit(jobs, evaluate=SimpleJob(tmp_path, "e"))
    assert third.new == ("m/fold_0",) and third.folds["m/fold_1"] == "101"
    assert third.evaluation is not None
    assert f"--dependency=afterany:{third.folds['m/fold_0']}:101" in (slurm / third.evaluation).read_text()


def test_a_refused_job_keeps_those_before(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [SimpleJob(tmp_path, name) for name in ("a", "b", "c")]
    monkeypatch.setenv("REFUSE_FROM", "2")
    with pytest.raises(BenchmarkError, match=r"refuses the job for c: .*invalid partition.*2 of 3 fold jobs"):
        SlurmGrid(tmp_path / "out", SlurmSettings()).submit(jobs)
    assert json.loads((tmp_path / "out" / "jobs.json").read_text())["folds"] == {"a": "100", "b": "101"}
    monkeypatch.delenv("REFUSE_FROM")
    assert SlurmGrid(tmp_path / "out", SlurmSettings()).submit(jobs).new == ("c",)


def test_a_slurm_that_does_not_answer_is_named(tmp_path: Path, slurm: Path) -> None:
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'cannot contact controller' >&2; exit 1\n")
    with pytest.raises(BenchmarkError, match=r"SLURM does not answer .*cannot contact controller"):
        slurm_jobs.jobs_in_queue()


@pytest.mark.usefixtures("slurm")
def test_a_job_that_left_no_result_has_failed(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_jobs, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(slurm_jobs, "_LOOK_SECONDS", 0.05)
    jobs = [SimpleJob(tmp_path, "a")]
    executor = SlurmGrid(tmp_path / "out", SlurmSettings())
    submission = executor.submit(jobs)
    (slurm / "100").unlink()
    log = tmp_path / "out" / "slurm" / "100" / "100_0_log.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    (outcome,) = executor.wait(jobs, submission)
    assert outcome.error is not None and "oom_kill" in outcome.error and "Run again" in outcome.error


def test_a_preempted_fold_is_requeued_as_it_is(fold_job: FoldJob) -> None:
    delayed = fold_job.checkpoint()
    assert isinstance(delayed, DelayedSubmission) and delayed.function is fold_job
