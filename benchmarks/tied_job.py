"""A job of this machine that ends with the process that started it. Light: each training is waited for by a process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Self

import psutil

from .executors import GridJob

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class TiedJob:
    """Is interrupted, as by Ctrl-C, when its owner is gone, as after ``kill -9``; submitit's own jobs go on then.

    The next run would find the fold taken, and train another one beside it on the same device.

    Attributes:
        job: what to do.
        owner: number of the process that started it.
    """

    job: GridJob
    owner: int

    @classmethod
    def to_this_process(cls, job: GridJob) -> Self:
        """Tie a job to the process that calls this."""
        return cls(job, os.getpid())

    def __call__(self) -> object:
        """Do the job. It is to be started with SIGINT blocked."""
        os.setpgrp()  # a terminal's Ctrl-C goes to its owner, who passes it on
        threading.Thread(target=self._look, daemon=True, name="owner").start()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background commands ignore it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return self.job()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            owner = psutil.Process(self.owner)
            while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
