"""Work in other processes, where a task that fails, or whose process dies, costs itself only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

from masksam_nnunet.errors import CaseError, PredictError, in_short


class Task:
    """A call that has been handed over."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.future: Future[Any] | None = None
        """None: it runs in this process, when its result is asked for."""


class Workers:
    """Spawned processes, started as they are needed; they end with this process, however it ends.

    Args:
        processes: 0 to work in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Hand over a call; the function is a module's own."""
        task = Task(function, arguments)
        if self.processes:
            try:
                task.future = self._submit(task)
            except BrokenProcessPool:
                self._end()
                task.future = self._submit(task)
        return task

    def result(self, task: Task) -> Any:
        """Wait for what the call returns. What it took is let go.

        Raises:
            CaseError: it failed, or its process died; in words.
            PredictError: it cannot be done for any case.
        """
        try:
            value, failure = _run(task.function, task.arguments) if task.future is None else task.future.result()
        except BrokenProcessPool:
            value, failure = self._alone(task)
        finally:
            task.arguments, task.future = (), None
        if failure is not None:
            raise failure
        return value

    def in_order(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Task]:
        """The tasks of calls, in their order; as many are ahead of the one that is yielded as there are processes."""
        ahead: deque[Task] = deque()
        for arguments in calls:
            ahead.append(self.start(function, *arguments))
            if len(ahead) > self.processes:
                yield ahead.popleft()
        yield from ahead

    def _submit(self, task: Task) -> Future[Any]:
        if self._executor is None:
            self._executor = _executor(self.processes)
        return self._executor.submit(_run, task.function, task.arguments)

    def _alone(self, task: Task) -> tuple[Any, CaseError | PredictError | None]:
        """A process died, and with it what others had in hand. Which one was to blame shows when each works alone."""
        self._end()
        with _executor(1) as executor:
            try:
                outcome: tuple[Any, CaseError | PredictError | None] = executor.submit(
                    _run, task.function, task.arguments
                ).result()
            except BrokenProcessPool:
                return None, CaseError(
                    "the process that worked on it died, most likely killed because memory ran out (else it says why): "
                    "give it more, or predict this case by itself"
                )
        return outcome

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _executor(processes: int) -> ProcessPoolExecutor:
    # Spawned, as nnU-Net's own workers are: a fork does not survive CUDA.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """Else workers would wait for ever for a parent that was killed, and write when it has been started again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            with contextlib.suppress(OSError):
                wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="parent").start()


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, CaseError | PredictError | None]:
    """What the function returns, and what is wrong: errors of libraries do not all travel between processes."""
    try:
        return function(*arguments), None
    except (CaseError, PredictError) as error:
        return None, error
    except Exception as error:
        return None, CaseError(in_short(error))
