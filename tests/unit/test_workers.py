"""Tasks in other processes: failures apart, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from masksam_nnunet.errors import CaseError, PredictError
from masksam_nnunet.inference.predict.workers import Workers


class OddError(Exception):
    """Cannot be made again from its text, hence not travel between processes."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__("odd")


def work(number: int) -> int:
    match number:
        case 1:
            raise CaseError("file 1 is bad")
        case 2:
            raise OddError(1, 2)
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            raise PredictError("disk full")
    return 10 * number


def outcome(workers: Workers, task: object) -> object:
    try:
        return workers.result(task)  # type: ignore[arg-type]
    except (CaseError, PredictError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("processes", [0, 2])
def test_each_failure_is_its_own(processes: int) -> None:
    numbers = [0, 1, 5, 2, 6, 4] if processes == 0 else [0, 1, 3, 5, 2, 4, 7]
    with Workers(processes) as workers:
        found = [outcome(workers, task) for task in workers.in_order(work, [(n,) for n in numbers])]
        again = outcome(workers, workers.start(work, 8))
    expected = {0: 0, 1: "CaseError file 1 is bad", 2: "CaseError OddError: odd", 4: "PredictError disk full"}
    for number, got in zip(numbers, found, strict=True):
        if number == 3:
            assert "died" in str(got) and "memory" in str(got)
        else:
            assert got == expected.get(number, 10 * number)
    assert again == 80


def test_not_more_is_ahead_than_there_are_processes() -> None:
    begun: list[int] = []

    class Counted(Workers):
        def start(self, function, *arguments):  # type: ignore[no-untyped-def]
            begun.append(arguments[0])
            return super().start(function, *arguments)

    with Counted(1) as workers:
        for number, task in enumerate(workers.in_order(work, [(n,) for n in range(10, 16)])):
            assert workers.result(task) == 10 * (10 + number)
            assert len(begun) <= number + 2


LOST = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_workers import slow
from masksam_nnunet.inference.predict.workers import Workers
if __name__ == "__main__":
    workers = Workers(1)
    workers.result(workers.start(slow, sys.argv[1]))
"""


def slow(file: str) -> None:
    """Tells its process, then works for long."""
    draft = Path(f"{file}.part")
    draft.write_text(str(os.getpid()))
    draft.rename(file)
    time.sleep(300)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script, told = tmp_path / "lost.py", tmp_path / "pid"
    script.write_text(LOST)
    parent = subprocess.Popen([sys.executable, str(script), str(told), str(Path(__file__).parent)])
    try:
        deadline = time.monotonic() + 120
        while not told.is_file():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    worker = int(told.read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)
