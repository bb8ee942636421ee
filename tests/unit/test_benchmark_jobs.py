"""nnU-Net's commands as subprocesses that end with their parent, and folds run on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from simple_jobs import simple_jobs

from masksam_nnunet.benchmarks import jobs as jobs_module
from masksam_nnunet.benchmarks import nnunet
from masksam_nnunet.benchmarks.folds import FoldRecord
from masksam_nnunet.benchmarks.jobs import FoldJob, gpu_of, run_local
from masksam_nnunet.benchmarks.nnunet import run_nnunet, run_to_end, termination_as_exit
from masksam_nnunet.environment import BUDGET_ITERATIONS, BUDGET_MINUTES
from masksam_nnunet.errors import TrainingError, UsageError
from masksam_nnunet.inference.methods import ModelName

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups")

TRAINS = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(os.environ["TEST_FOLDER"])

def save(number, frame):
    (folder / "saved").touch()
    sys.exit(75)

def main():
    kind, *rest = sys.argv[1:]
    print("the command says", kind, *rest, flush=True)
    if kind == "fails":
        sys.exit(3)
    if kind == "signalled":
        os.kill(os.getpid(), signal.SIGUSR2)
    if kind in ("waits", "saves"):
        if kind == "saves":
            signal.signal(signal.SIGUSR1, save)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        (folder / "ids_").write_text(f"{os.getpid()} {worker.pid}")
        (folder / "ids_").rename(folder / "ids")
        time.sleep(100)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a console command ``test_train``, which behaves as its first argument says."""
    site = tmp_path / "site"
    (site / "test_train-1.dist-info").mkdir(parents=True)
    (site / "test_train-1.dist-info" / "METADATA").write_text("Name: test_train\nVersion: 1\n")
    (site / "test_train-1.dist-info" / "entry_points.txt").write_text("[console_scripts]\ntest_train = trains:main\n")
    (site / "trains.py").write_text(TRAINS)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    return tmp_path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(folder: Path) -> bool:
    """Whether the command and its worker have ended."""
    return not any(runs(int(number)) for number in (folder / "ids").read_text().split())


def test_a_failing_command_raises_with_the_end_of_its_log(folder: Path) -> None:
    log = folder / "logs" / "x.log"
    run_nnunet("test_train", ["works", "2 d"], os.environ, log)
    assert log.read_text().splitlines() == ["$ test_train works '2 d'", "the command says works 2 d"]
    assert run_to_end("test_train", ["signalled"], os.environ, log) == 0, "submitit's signal must not reach it"
    with pytest.raises(TrainingError, match=r"(?s)exit status 3.*x\.log.*the command says fails"):
        run_nnunet("test_train", ["fails"], os.environ, log)
    with pytest.raises(UsageError, match="nnUNetv2_dance"):
        run_nnunet("nnUNetv2_dance", [], {}, log)


def interrupts(folder: Path, number: signal.Signals) -> Callable[[int], None]:
    """Sends this process a signal once the command runs, which must be out of reach of a terminal's Ctrl-C."""

    def interrupt(process: int) -> None:
        if (folder / "ids").exists():
            assert os.getsid(int((folder / "ids").read_text().split()[0])) != os.getsid(0)
            signal.raise_signal(number)

    return interrupt


@contextmanager
def default_interrupt() -> Iterator[None]:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_command_saves_and_ends_with_its_workers(
    folder: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    with default_interrupt(), pytest.raises(error), termination_as_exit():
        run_to_end("test_train", ["saves"], os.environ, folder / "log", look=interrupts(folder, number))
    assert (folder / "saved").exists()
    wait_for(lambda: ended(folder))


def test_a_command_that_does_not_save_in_time_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunet, "SAVE_SECONDS", 0.0)
    with default_interrupt(), pytest.raises(KeyboardInterrupt):
        run_to_end("test_train", ["waits"], os.environ, folder / "log", look=interrupts(folder, signal.SIGINT))
    wait_for(lambda: ended(folder))


def test_a_command_and_its_workers_end_when_their_parent_is_killed(folder: Path) -> None:
    code = "import os, pathlib; from masksam_nnunet.benchmarks.nnunet import run_to_end as run;"
    code += f"run('test_train', ['saves'], os.environ, pathlib.Path('{folder}/log'))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for((folder / "ids").exists)
    parent.kill()
    parent.wait()
    wait_for(lambda: ended(folder))


def test_jobs_run_one_at_a_time_on_each_device_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    jobs = simple_jobs(tmp_path, "A", "B", "C", failing="B")
    seen: list[Mapping[str, str]] = []
    errors = run_local(jobs, ["cpu"], seen.append)
    assert list(errors) == [jobs[1].name] and "has no data" in errors[jobs[1].name]
    assert list(seen[-1].values()) == ["done", "failed", "done"]
    first, third = ((jobs[i].folder / "ran").read_text().split() for i in (0, 2))
    assert float(first[1]) < float(third[0])
    more = simple_jobs(tmp_path / "two", "A", "B")
    assert run_local(more, ["0", "1"]) == {}
    told = [(job.folder / "ran").read_text().split() for job in more]
    assert {gpu for _, _, gpu in told} == {"0", "1"} and float(told[1][0]) < float(told[0][1])


def test_a_terminals_interrupt_lets_a_fold_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold_inputs(folder / "saves")
    monkeypatch.setattr(jobs_module, "COMMAND", "test_train")
    environment = {"nnUNet_results": str(folder), "nnUNet_preprocessed": str(folder)}
    job = FoldJob("saves", ModelName("T", "P", "2d"), 0, "cpu", environment)
    interrupted, began = interrupts(folder, signal.SIGINT), time.monotonic()

    def watch(statuses: Mapping[str, str]) -> None:
        if time.monotonic() - began > 3:  # its owner looks twice a second
            interrupted(0)

    with default_interrupt(), pytest.raises(KeyboardInterrupt):
        run_local([job], ["cpu"], watch)
    assert (folder / "saved").exists()
    wait_for(lambda: ended(folder))
    record = FoldRecord.read(job.folder)
    assert record is not None
    (part,) = record.parts
    assert (part.kind, part.exit_status) == ("train", 75) and "CPU cores" in str(part.device)
    assert part.peak_memory_mib is not None and part.peak_memory_mib > 5 and part.train_seconds is not None


def fold_inputs(preprocessed: Path) -> None:
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text('[{"train": ["a"], "val": ["b", "c"]}]')
    (preprocessed / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    (preprocessed / "P.json").write_text('{"configurations": {"2d": {}}}')


def test_a_fold_that_fails_names_its_command_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"nnUNet_results": str(tmp_path), "nnUNet_preprocessed": str(tmp_path)}
    job = FoldJob("D", ModelName("T", "P", "2d"), 0, "cpu", environment, npz=True)
    fold_inputs(tmp_path / "D")
    usage = jobs_module.shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(jobs_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(jobs_module, "run_to_end", lambda *arguments: 1)
    with pytest.raises(TrainingError) as caught:
        job.run()
    assert "nnUNetv2_train D 2d 0 -tr T -p P -device cpu --npz" in str(caught.value)
    assert f"3 MiB are free in {job.folder}" in str(caught.value)
    with jobs_module.locked(job.folder, ""), pytest.raises(TrainingError, match="another process"):
        job.run()


def test_a_fold_that_comes_no_further_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"nnUNet_results": str(tmp_path), "nnUNet_preprocessed": str(tmp_path)}
    job = FoldJob("D", ModelName("T", "P", "2d"), 0, "cpu", environment)
    fold_inputs(tmp_path / "D")
    runs: list[object] = []
    monkeypatch.setattr(jobs_module, "run_to_end", lambda *arguments: runs.append(arguments) or 0)
    with pytest.raises(TrainingError, match=job.name):
        job.run()
    assert len(runs) == 1
    (job.folder / "checkpoint_latest.pth").write_bytes(b"cut")
    with pytest.raises(TrainingError, match=r"checkpoint_latest\.pth"):
        job.run()
    assert len(runs) == 1, "a damaged checkpoint is nobody's to continue from"


def test_a_budget_that_the_benchmark_did_not_give_is_compared_too(tmp_path: Path) -> None:
    environment = {"nnUNet_results": str(tmp_path), "nnUNet_preprocessed": str(tmp_path)}
    hour = FoldJob("D", ModelName("T", "P", "2d"), 0, "cpu", environment, minutes=60)
    hour.folder.mkdir(parents=True)
    hour.require_unchanged()  # a trainer without a budget notes none
    (hour.folder / "training_stats.json").write_text('{"budget_seconds": 720.0}')
    with pytest.raises(TrainingError, match=r"--minutes 12\.0"):
        hour.require_unchanged()
    replace(hour, minutes=12).require_unchanged()


def test_the_environment_of_a_training_has_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_n_proc_DA", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", BUDGET_MINUTES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(BUDGET_ITERATIONS, "7")
    given = "D", ModelName("T", "P", "2d"), 0
    by_minutes = FoldJob(*given, "cpu", {"nnUNet_results": "r"}, minutes=3).whole_environment(None)
    assert by_minutes[BUDGET_MINUTES] == "3" and BUDGET_ITERATIONS not in by_minutes
    assert (by_minutes["nnUNet_n_proc_DA"], by_minutes["OMP_WAIT_POLICY"]) == ("0", "PASSIVE")
    assert by_minutes["nnUNet_results"] == "r" and "CUDA_VISIBLE_DEVICES" not in by_minutes
    by_iterations = FoldJob(*given, "cuda", {}, iterations=5).whole_environment("3")
    assert by_iterations[BUDGET_ITERATIONS] == "5" and by_iterations["CUDA_VISIBLE_DEVICES"] == "3"
    assert "nnUNet_n_proc_DA" not in by_iterations


def test_gpus_count_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, visible, expected in (
        ("cpu", "3,5", None),
        ("1", "3,5", "5"),
        ("cuda", "GPU-a, b", "GPU-a"),
        ("1", "", "1"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_of(device) == expected
