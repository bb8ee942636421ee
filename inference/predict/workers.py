"""Call a function for many cases in other processes; a call that fails, or whose process dies, costs one case."""

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
from typing import Any, Self

from masksam_nnunet.errors import CaseError, MaskSAMError, in_short


class Workers:
    """Spawned processes, started when they are needed; they end with this process, however it ends.

    Args:
        processes: 0 to work in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def outcomes(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[str, tuple[Any, ...]]],
        waiting: int = 0,
    ) -> Iterator[tuple[str, Any]]:
        """Yield each call's name and result, in order; a ``CaseError`` is the result of a call that failed.

        Args:
            function: of a module, so that it can be pickled.
            calls: name and arguments; taken while others run, at most ``processes + waiting`` ahead.
            waiting: calls that may wait for a free process.

        Raises:
            MaskSAMError: a call failed for a reason that concerns all cases.
        """
        most = self.processes + waiting if self.processes else 0
        ahead: deque[tuple[str, tuple[Any, ...], Future[Any] | None]] = deque()
        for name, arguments in calls:
            ahead.append((name, arguments, self._submit(function, arguments) if self.processes else None))
            del arguments  # large
            if len(ahead) > most:
                yield self._finish(function, *ahead.popleft())
        while ahead:
            yield self._finish(function, *ahead.popleft())

    def _submit(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
        if self._executor is None:
            self._executor = _executor(self.processes)
        try:
            return self._executor.submit(_attempt, function, arguments)
        except BrokenProcessPool:
            self._end()
            return self._submit(function, arguments)

    def _finish(
        self, function: Callable[..., Any], name: str, arguments: tuple[Any, ...], future: Future[Any] | None
    ) -> tuple[str, Any]:
        """Wait for a call, or make it in this process if it has no future."""
        try:
            outcome = future.result() if future else _attempt(function, arguments)
        except BrokenProcessPool:  # ends all calls; which one is to blame shows when each runs alone
            self._end()
            with _executor(1) as executor:
                try:
                    outcome = executor.submit(_attempt, function, arguments).result()
                except BrokenProcessPool:
                    outcome = CaseError("its process died, probably for lack of memory; predict this case by itself")
        if isinstance(outcome, MaskSAMError) and not isinstance(outcome, CaseError):
            raise outcome
        return name, outcome

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _executor(processes: int) -> ProcessPoolExecutor:
    # Spawned, as nnU-Net's own workers are: a fork does not survive CUDA.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for ever, or write beside the parent's successor."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            with contextlib.suppress(OSError):
                wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="parent").start()


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return the result, or the error: errors of libraries do not all travel between processes."""
    try:
        return function(*arguments)
    except MaskSAMError as error:
        return error
    except Exception as error:
        return CaseError(in_short(error))
