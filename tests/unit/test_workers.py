"""Calls in other processes: failures apart, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from masksam_nnunet.errors import CaseError, UsageError
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
            raise UsageError("disk full")
    return 10 * number


def calls(numbers: list[int]) -> list[tuple[str, tuple[int]]]:
    return [(str(number), (number,)) for number in numbers]


@pytest.mark.parametrize("processes", [0, 2])
def test_each_failure_is_its_own(processes: int) -> None:
    numbers = [0, 1, 5, 2, 6] if processes == 0 else [0, 1, 3, 5, 2, 7]
    with Workers(processes) as workers:
        found = {int(name): outcome for name, outcome in workers.outcomes(work, calls(numbers))}
        assert list(workers.outcomes(work, calls([8]))) == [("8", 80)], "they can be used again"
        with pytest.raises(UsageError, match="disk full"):
            list(workers.outcomes(work, calls([4, 8])))
    assert list(found) == numbers
    for number, outcome in found.items():
        if number in (1, 2, 3):
            assert isinstance(outcome, CaseError)
        else:
            assert outcome == 10 * number
    assert "file 1 is bad" in str(found[1]) and "OddError" in str(found[2])


@pytest.mark.parametrize(("processes", "waiting", "ahead"), [(0, 2, 0), (1, 2, 3)])
def test_calls_are_taken_as_they_are_needed(processes: int, waiting: int, ahead: int) -> None:
    taken: list[str] = []

    def given() -> Iterator[tuple[str, tuple[int]]]:
        for name, arguments in calls(list(range(10, 17))):
            taken.append(name)
            yield name, arguments

    with Workers(processes) as workers:
        for number, outcome in enumerate(workers.outcomes(work, given(), waiting)):
            assert outcome == (str(10 + number), 10 * (10 + number))
            assert len(taken) <= number + 1 + ahead


def slow(file: str) -> None:
    """Write the process's number, then work for long."""
    draft = Path(f"{file}.part")
    draft.write_text(str(os.getpid()))
    draft.rename(file)
    time.sleep(300)


def parent(file: str) -> None:
    list(Workers(1).outcomes(slow, [("a", (file,))]))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    process = multiprocessing.get_context("spawn").Process(target=parent, args=(str(told),))
    process.start()
    deadline = time.monotonic() + 180
    while not told.is_file():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.join()
    worker = int(told.read_text())
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)
