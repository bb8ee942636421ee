"""The grid on this machine: one job at a time on each device, through submitit's local executor."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import psutil
import torch
from submitit import Job, LocalExecutor

from masksam_nnunet.errors import BenchmarkError

from .commands import SAVE_SECONDS, blocked, kill_after, termination_as_exit
from .executors import FOREVER_MINUTES, GridJob, Outcome, Status, Watch, outcome_of
from .tied_job import TiedJob

_LOOK_SECONDS = 0.5
_END_SECONDS = SAVE_SECONDS + 5


def device_kind(devices: Sequence[str]) -> str:
    """What nnU-Net calls the devices that ``--devices`` names: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        BenchmarkError: unknown, repeated or mixed devices.
    """
    if not devices:
        raise BenchmarkError("--devices: give cpu, mps, cuda or numbers of GPUs, such as --devices 0 1")
    if len(set(devices)) < len(devices):
        raise BenchmarkError(f"--devices {' '.join(devices)}: each device once; jobs on one device run in turn")
    kinds = {"cuda" if device.isdecimal() or device == "cuda" else device for device in devices}
    unknown = sorted(kinds - {"cpu", "cuda", "mps"})
    if unknown:
        raise BenchmarkError(f"--devices {' '.join(unknown)}: give cpu, mps, cuda or numbers of GPUs, such as 0 1")
    if len(kinds) > 1:
        raise BenchmarkError(
            f"--devices {' '.join(devices)}: hours on different kinds of devices cannot be compared; give one kind"
        )
    if "cuda" in devices and len(devices) > 1:
        raise BenchmarkError(f"--devices {' '.join(devices)}: give the numbers of all GPUs instead of cuda")
    return kinds.pop()


def check_devices(devices: Sequence[str]) -> None:
    """Whether this machine has them.

    Raises:
        BenchmarkError: if not.
    """
    kind = device_kind(devices)
    number = torch.cuda.device_count()
    missing = [device for device in devices if device.isdecimal() and int(device) >= number]
    if missing or (kind == "cuda" and number == 0):
        raise BenchmarkError(
            f"--devices {' '.join(devices)}: PyTorch sees {number} GPUs here; --devices cpu needs none"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BenchmarkError("--devices mps: PyTorch finds none here; --devices cpu always works")


class LocalGrid:
    """Runs jobs on this machine; they end with it."""

    def __init__(self, folder: Path, devices: Sequence[str]) -> None:
        """Args: submitit's folder, and devices as ``--devices`` names them."""
        check_devices(devices)
        # submitit names a job's files by its process id, which may repeat.
        self.folder = folder / datetime.now().strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")
        self.devices = tuple(devices)

    def run(
        self, jobs: Sequence[GridJob], evaluate: Callable[[], object] | None = None, watch: Watch | None = None
    ) -> tuple[Outcome, ...]:
        """See :class:`~.executors.GridExecutor`; ``evaluate`` runs in this process."""
        waiting = deque(jobs)
        free = list(self.devices)
        running: dict[str, tuple[GridJob, str, Job[object]]] = {}
        outcomes: dict[str, Outcome] = {}
        with termination_as_exit(), _ended_with_us(running):
            while waiting or running:
                while waiting and free:
                    job, device = waiting.popleft(), free.pop(0)
                    try:
                        running[job.name] = (job, device, self._start(job, device))
                    except OSError as error:  # a full disk must not end what runs on other devices
                        told = f"{job.name}: the job cannot be started: {error}; make room and run again"
                        outcomes[job.name] = Outcome(job.name, told, job.log)
                        free.append(device)
                for name, (job, device, submitted) in list(running.items()):
                    if submitted.done():
                        outcomes[name] = outcome_of(job, submitted)
                        del running[name]
                        free.append(device)
                if watch is not None:
                    watch({job.name: _status(job.name, running, outcomes) for job in jobs})
                if running:
                    time.sleep(_LOOK_SECONDS)
        if evaluate is not None:
            evaluate()
        return tuple(outcomes[job.name] for job in jobs)

    def _start(self, job: GridJob, device: str) -> Job[object]:
        executor = LocalExecutor(self.folder)
        executor.update_parameters(timeout_min=FOREVER_MINUTES)
        tied = TiedJob.to_this_process(job.on(gpu_name(device)))
        # A terminal sends Ctrl-C to all it runs, and submitit's controller would kill the training within a second.
        with blocked([signal.SIGINT]):
            submitted: Job[object] = executor.submit(tied)
        return submitted


def gpu_name(device: str) -> str | None:
    """What ``CUDA_VISIBLE_DEVICES`` must say for one of ``--devices``; None if that is no GPU.

    submitit hides all GPUs from its jobs. Numbers count among those that this process may see, as PyTorch's do;
    ``cuda`` is the first.
    """
    if device in ("cpu", "mps"):
        return None
    number = 0 if device == "cuda" else int(device)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if visible else str(number)


def _status(name: str, running: dict[str, tuple[GridJob, str, Job[object]]], outcomes: dict[str, Outcome]) -> Status:
    if name in running:
        return Status.RUNNING
    if name in outcomes:
        return Status.DONE if outcomes[name].error is None else Status.FAILED
    return Status.WAITING


@contextlib.contextmanager
def _ended_with_us(running: dict[str, tuple[GridJob, str, Job[object]]]) -> Iterator[None]:
    """End what runs when this process is interrupted; submitit would leave it running."""
    try:
        yield
    except BaseException:
        if running:
            told = f"ending {', '.join(running)}; what can save, does so first, for up to {SAVE_SECONDS:.0f} seconds"
            print(told, file=sys.stderr, flush=True)
        family = []
        for _, _, submitted in running.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                controller = psutil.Process(int(submitted.job_id))
                family += [*controller.children(recursive=True), controller]
                # Not the controller, which would leave them a second: their trainings may have something to save.
                tasks = controller.children()
                for task in tasks:
                    task.send_signal(signal.SIGINT)
                if not tasks:  # not started yet
                    controller.terminate()
        kill_after(family, _END_SECONDS)
        raise
