"""SIGTERM, SIGUSR1 and SIGUSR2 make a training save and exit with a status that asks to be started again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

REQUEUE = 75
"""The exit status of a training that saved because it was asked to: sysexits' EX_TEMPFAIL."""
WORKER_SECONDS = 60
"""How long a forked worker outlives SIGTERM, so that its parent can finish the iteration it needs a batch for."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@contextlib.contextmanager
def handling(react: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Call ``react`` with each signal that this process receives inside this context; ignored ones stay ignored.

    Without effect outside the main thread, where Python allows no handlers.
    """
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            react(signal.Signals(number))
        elif number == signal.SIGTERM:  # SLURM signals every process of a job; a forked worker has these handlers
            signal.alarm(WORKER_SECONDS)  # whose default ends it

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


def pass_on(received: signal.Signals) -> None:
    """Pass a signal on to this process's ranks; without ranks, exit at once."""
    ranks = [rank.pid for rank in multiprocessing.active_children() if rank.pid is not None]
    if not ranks:
        leave_at_once()
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, received)


def leave_at_once(received: signal.Signals | None = None) -> NoReturn:
    """End this process and its workers without cleaning up, since pools whose workers died would block it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a signal may have come in the middle of a print
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(REQUEUE)
