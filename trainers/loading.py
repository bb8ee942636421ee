"""nnU-Net's data loading processes: they may die, and must not outlive the training."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from masksam_nnunet.errors import TrainingError

DEAD_SECONDS = 15.0
"""How long batches may stay away after a worker's death before the loader is given up."""
SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_parent: int | None = None  # set while forked processes are to end with this one


class LoaderWatch:
    """Takes batches from one of nnU-Net's loaders and watches its worker processes.

    A worker that was killed may hold a lock or half a message, and a thread that waits for it waits for ever. So an
    extra thread waits, while the training's thread looks at the workers.

    Args:
        loader: single- or multi-threaded.
        give_up: asked about twice a second during a wait; true ends the wait.
    """

    def __init__(self, loader: Any, give_up: Callable[[], bool] = lambda: False) -> None:
        self.loader = loader
        self.give_up = give_up
        self._workers = list(getattr(loader, "_processes", ()))
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[Any] = SimpleQueue()
        if self._workers:
            threading.Thread(target=self._fetch, daemon=True, name="batches").start()

    def next_batch(self) -> dict[str, Any] | None:
        """The next batch; None if ``give_up`` ended the wait.

        Raises:
            TrainingError: the loader gives no more batches.
        """
        if not self._workers:
            return next(self.loader)
        self._wanted.put(True)
        dead_since = float("inf")
        while time.monotonic() - dead_since < DEAD_SECONDS:
            with contextlib.suppress(Empty):
                made = self._made.get(timeout=_POLL_SECONDS)
                if isinstance(made, BaseException):
                    raise TrainingError(self._why()) from made
                return dict(made)
            if self.give_up():
                return None
            if not all(worker.is_alive() for worker in self._workers):
                dead_since = min(dead_since, time.monotonic())
        raise TrainingError(self._why())

    def end(self) -> None:
        """Kill the workers, and leave the loader as if it had never started: its own way to stop may wait for ever."""
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
        codes = [worker.exitcode for worker in self._workers if worker.exitcode]
        if not codes:
            return "a data loading worker failed; its error is printed above"
        names = ", ".join(signal.Signals(-code).name if code < 0 else f"exit status {code}" for code in codes)
        return (
            f"{len(codes)} of {len(self._workers)} data loading workers ended by {names} (SIGKILL usually means too "
            "little memory). Give the job more memory, or set nnUNet_n_proc_DA to fewer workers"
        )


def require_shared_memory(batch_bytes: int, pinned: bool) -> None:
    """Refuse to start workers that pass batches of this size through too small a /dev/shm, such as Docker's 64 MB.

    PyTorch would lose the batches that do not fit, and the training wait for them. Batches that are ``pinned`` for a
    GPU leave it when they arrive.

    Raises:
        TrainingError: naming the room and the remedies.
    """
    workers = get_allowed_n_proc_DA()
    if not workers or not SHARED_MEMORY.is_dir():
        return
    # What nnU-Net's workers may hold at once, to train and to validate: being made, waiting, and arrived.
    waiting = max(6, workers // 2) + max(3, workers // 4)
    batches = workers + max(1, workers // 2) + waiting * (1 if pinned else 2)
    needed, room = batches * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if room < needed:
        raise TrainingError(
            f"{SHARED_MEMORY} has {room / 2**20:.3g} MiB of room, but {workers} data loading workers may need "
            f"{needed / 2**20:.3g} MiB of it: start the container with --shm-size={math.ceil(needed / 2**30) + 1}g, or "
            "set nnUNet_n_proc_DA to fewer workers (0: none, slower)"
        )


@contextlib.contextmanager
def forks_end_with_parent() -> Iterator[None]:
    """Processes that this one forks meanwhile are killed when it ends, however it ends; Linux only.

    The kernel watches the thread that forks, which therefore must last.
    """
    global _parent
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


def _end_with_parent() -> None:
    global _parent
    parent, _parent = _parent, None
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended in between
        os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_parent)
