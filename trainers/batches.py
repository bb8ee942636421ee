"""nnU-Net's batches, whose worker processes may die, and must not outlive the training."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from masksam_nnunet.errors import TrainingError

DEAD_SECONDS = 15.0
"""How long batches may stay away after a worker's death before the loader is given up."""
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_parent: int | None = None


class WorkersFailed(TrainingError):
    """The loader gives no more batches."""


class NotWaited(Exception):
    """The training was asked to end while it waited for a batch."""


class Batches:
    """Batches of one of nnU-Net's loaders.

    A worker that was killed may hold a lock or half a message, and whoever waits for it waits for ever: so a thread
    does, and this one looks at the workers meanwhile.

    Args:
        loader: single- or multi-threaded.
        give_up: asked about twice a second during a wait: whether the batch is not needed any more.
    """

    def __init__(self, loader: Any, give_up: Callable[[], bool] = lambda: False) -> None:
        self.loader = loader
        self.give_up = give_up
        self._workers = list(getattr(loader, "_processes", ()))
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[Any] = SimpleQueue()
        if self._workers:
            threading.Thread(target=self._fetch, daemon=True, name="batches").start()

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            WorkersFailed: there will be none.
            NotWaited: it is not needed any more.
        """
        if not self._workers:
            batch: dict[str, Any] = next(self.loader)
            return batch
        self._wanted.put(True)
        dead_since: float | None = None
        while True:
            try:
                made = self._made.get(timeout=_POLL_SECONDS)
            except Empty:
                if self.give_up():
                    raise NotWaited from None
                if dead_since is None and not all(worker.is_alive() for worker in self._workers):
                    dead_since = time.monotonic()
                if dead_since is not None and time.monotonic() - dead_since > DEAD_SECONDS:
                    raise WorkersFailed(self._why()) from None
                continue
            if isinstance(made, BaseException):
                raise WorkersFailed(self._why()) from made
            return dict(made)

    def end(self) -> None:
        """Kill the workers, and leave the loader as one that never started: its own way to stop may wait for ever."""
        self._wanted.put(False)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join(5)
        if self._workers:
            self.loader._processes, self.loader.initialized = [], False

    def _fetch(self) -> None:
        while self._wanted.get():
            try:
                self._made.put(next(self.loader))
            except BaseException as error:
                self._made.put(error)

    def _why(self) -> str:
        codes = [worker.exitcode for worker in self._workers]
        ended = [f"process {w.pid} by {_word(c)}" for w, c in zip(self._workers, codes, strict=True) if c]
        if not ended:
            return "a data loading worker ended with an error of its own, which is printed above"
        more = "; the system kills (SIGKILL) what takes more memory than there is" if -signal.SIGKILL in codes else ""
        return (
            f"{len(ended)} of {len(codes)} data loading workers ended: {', '.join(ended)}{more}. Give the job more "
            "memory, or set nnUNet_n_proc_DA to fewer workers"
        )


def _word(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


@contextlib.contextmanager
def forks_end_with_us() -> Iterator[None]:
    """What is forked meanwhile is killed when this process ends, however it ends; else workers would stay for ever.

    Linux only, and only from the main thread: it is that thread's end that counts.
    """
    global _parent
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        yield
        return
    _register()
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


_registered = False


def _register() -> None:
    global _registered
    if not _registered:
        os.register_at_fork(after_in_child=_end_with_parent)
        _registered = True


def _end_with_parent() -> None:
    global _parent
    parent, _parent = _parent, None
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be told
        os._exit(1)
