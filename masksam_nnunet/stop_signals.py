"""SIGTERM, SIGUSR1 and SIGUSR2 make a training save and exit with a status that asks to be started again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

REQUEUE = 75
"""The exit status of a training that saved because it was asked to: sysexits' EX_TEMPFAIL."""
REPEAT_SECONDS = 2.0
"""A second signal within this time counts as the first: SLURM, its script and a command may each pass it on."""
WORKER_SECONDS = 60
"""How long a forked worker outlives SIGTERM, so that its parent can finish the iteration it needs a batch for."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], None]


class StopSignals:
    """The stop signal that this process has received, and how it reacts.

    Inside :meth:`gentle` the first signal is only stored in :attr:`asked`; a second one ends the process at once.
    Outside, where there is nothing to save, the first one does.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._gentle = False
        self._since = 0.0
        self._owner = os.getpid()

    def handled(self) -> contextlib.AbstractContextManager[None]:
        """Handle the signals inside this context; ignored ones stay ignored."""
        return handling(self._handle)

    @contextlib.contextmanager
    def gentle(self) -> Iterator[None]:
        """Only store a first signal inside this context."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            _in_worker(number)
        elif self.asked is None and self._gentle:
            self.asked, self._since = signal.Signals(number), time.monotonic()
            _say(f"{self.asked.name}: this iteration is finished and saved, then the training ends")
        elif self.asked is None or time.monotonic() - self._since > REPEAT_SECONDS:
            leave_at_once()


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Install a handler inside this context; without effect outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, handler)) for number in taken]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Pass signals on to this process's ranks inside this context; without ranks, exit at once."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = [rank.pid for rank in multiprocessing.active_children() if rank.pid is not None]
        if not ranks:
            leave_at_once()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    with handling(pass_on):
        yield


def leave_at_once() -> NoReturn:
    """End this process and its workers without cleaning up, since pools whose workers died would block it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a signal may have come in the middle of a print
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(REQUEUE)


def _in_worker(number: int) -> None:
    """SLURM signals every process of a job; a forked worker has its parent's handlers."""
    if number == signal.SIGTERM:
        signal.alarm(WORKER_SECONDS)  # whose default ends it


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # print may have been interrupted, and must not be entered twice
