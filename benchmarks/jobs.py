"""Bring folds to their end with nnU-Net's own command, and run several of them on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from masksam_nnunet.environment import BUDGET_ITERATIONS, BUDGET_MINUTES, cores
from masksam_nnunet.errors import MaskSAMError, TrainingError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.methods import ModelName

from .folds import (
    FINAL,
    FoldRecord,
    FoldState,
    Part,
    Stage,
    device_name,
    fold_state,
    input_hashes,
    locked,
    now,
    trained_budget,
)
from .nnunet import SAVE_SECONDS, failed, run_to_end, termination_as_exit

COMMAND = "nnUNetv2_train"
Status = Literal["waiting", "running", "done", "failed"]
Watch = Callable[[Mapping[str, Status]], None]
"""Is called about twice a second with the status of each job, by name."""

_VARIABLES = ("nnUNet_", "MASKSAM_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # what may change a training
_LOOK_SECONDS = 0.5
_LITTLE_ROOM = 2**30  # free bytes: with less, a failure is likely to be for lack of room
_PARTS: Mapping[Stage, tuple[Literal["train", "continue", "validate"], tuple[str, ...]]] = {
    Stage.MISSING: ("train", ()),
    Stage.BROKEN_OFF: ("continue", ("--c",)),
    Stage.TRAINED: ("validate", ("--val",)),
}


@dataclass(frozen=True)
class FoldJob:
    """One fold of one method, to be trained and validated."""

    dataset: str
    method: ModelName
    fold: int
    device: str
    environment: Mapping[str, str]  # variables of nnU-Net and MaskSAM, nnU-Net's three folders among them
    minutes: float | None = None  # of a trainer with a budget, or its iterations
    iterations: int | None = None
    npz: bool = False  # whether validation saves probabilities

    @property
    def name(self) -> str:
        """Unique within a benchmark."""
        return f"{self.method.key}/fold_{self.fold}"

    @property
    def folder(self) -> Path:
        """The fold's folder in nnUNet_results."""
        return Path(self.environment["nnUNet_results"]) / self.dataset / self.method.key / f"fold_{self.fold}"

    @property
    def log(self) -> Path:
        """The output of nnU-Net's command."""
        return self.folder / "benchmark_train.log"

    @property
    def cases(self) -> list[str]:
        """The fold's validation cases."""
        return list(read_json(self.preprocessed / "splits_final.json")[self.fold]["val"])

    @property
    def preprocessed(self) -> Path:
        return Path(self.environment["nnUNet_preprocessed"]) / self.dataset

    def state(self) -> FoldState:
        """How far the fold has come."""
        ending = read_json(self.preprocessed / "dataset.json")["file_ending"]
        return fold_state(self.folder, self.cases, ending, self.npz)

    def require_unchanged(self) -> None:
        """Raise a TrainingError for a fold that was begun with other splits, plans, dataset.json or budget."""
        record = FoldRecord.read(self.folder)
        wanted = self.minutes, self.iterations
        if record is None:
            changed, budget = [], trained_budget(self.folder) or wanted
        else:
            changed, budget = record.changed_inputs(self.preprocessed), (record.minutes, record.iterations)
        wrong = [f"{name} has changed since its training" for name in changed]
        for name, before, own in zip(("minutes", "iterations"), budget, wanted, strict=True):
            if before != own:
                wrong.append(f"it was trained with --{name} {before}, not {own}")
        if wrong:
            raise TrainingError(f"{self.folder}: {'; '.join(wrong)}. Restore it, or move that folder away")

    def run(self, gpu: str | None = None, stop: threading.Event | None = None) -> None:
        """Train, continue or validate until the fold is done.

        Args:
            gpu: value for ``CUDA_VISIBLE_DEVICES``; None leaves it as it is.
            stop: ends the training when it is set; it may save before.

        Raises:
            TrainingError: nnU-Net's command fails; the checkpoint is damaged; another process trains this fold; its
                inputs have changed.
        """
        with locked(self.folder, "training this fold"):
            tried: set[Stage] = set()
            while (state := self.state()).stage is not Stage.DONE:
                if state.stage is Stage.DAMAGED:
                    raise TrainingError(state.reason)
                if state.stage in tried:
                    still = f"the fold is still {state.stage.value}: {state.reason}"
                    raise TrainingError(f"{self.name}: {COMMAND} ended without an error, but {still}; see {self.log}")
                tried.add(state.stage)
                self._run(state.stage, gpu, stop)

    def _run(self, stage: Stage, gpu: str | None, stop: threading.Event | None) -> None:
        kind, options = _PARTS[stage]
        method = self.method
        arguments = [self.dataset, method.configuration, str(self.fold), "-tr", method.trainer, "-p", method.plans]
        arguments += ["-device", self.device, *options, *(["--npz"] if self.npz else [])]
        line = shlex.join([COMMAND, *arguments])
        environment = self.whole_environment(gpu)
        if stage is not Stage.MISSING:
            self.require_unchanged()
        record = FoldRecord.read(self.folder)
        if record is None or stage is Stage.MISSING:
            record = FoldRecord(
                trainer=method.trainer,
                plans=method.plans,
                configuration=method.configuration,
                minutes=self.minutes,
                iterations=self.iterations,
                inputs=input_hashes(self.preprocessed, method.plans, method.configuration)
                if stage is Stage.MISSING
                else None,
                parts=[] if record is None else record.parts,
            )
        chosen = {k: v for k, v in sorted(environment.items()) if k.startswith(_VARIABLES) and "/" not in v}  # no paths
        part = Part(kind=kind, command=line, variables=chosen)
        record.parts.append(part)
        record.write(self.folder)
        began = time.monotonic()

        def look(process: int) -> None:
            if not (self.folder / FINAL).exists():  # it trains
                part.train_seconds = time.monotonic() - began
                if self.device != "cuda":
                    part.peak_memory_mib = max(part.peak_memory_mib or 0.0, _resident_mib(process))

        try:
            part.exit_status = run_to_end(COMMAND, arguments, environment, self.log, stop, look)
        finally:
            part.end, part.device = now(), device_name(self.folder, self.device)
            record.write(self.folder)
        if part.exit_status:
            free = shutil.disk_usage(self.folder).free  # the log, on the same disk, may not say that it is full
            room = f"\nOnly {free / 2**20:.0f} MiB are free in {self.folder}: make room" if free < _LITTLE_ROOM else ""
            raise TrainingError(f"{self.name}: {failed(line, part.exit_status, self.log)}{room}")

    def whole_environment(self, gpu: str | None) -> dict[str, str]:
        environment = os.environ | dict(self.environment) | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("nnUNet_def_n_proc", str(min(8, cores())))
        if self.device == "cpu":
            environment.setdefault("nnUNet_n_proc_DA", "0")  # the training itself uses every core
            # Beside another busy process, threads that spin while they wait make a step take twice as long.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if budget := budget_variables(self.minutes, self.iterations):
            environment.pop(BUDGET_ITERATIONS, None)  # it would take the place of the minutes
            environment |= budget
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return environment


def budget_variables(minutes: float | None, iterations: int | None) -> dict[str, str]:
    """The environment variable that tells a trainer its budget; none without one."""
    if iterations is not None:
        return {BUDGET_ITERATIONS: str(iterations)}
    return {} if minutes is None else {BUDGET_MINUTES: f"{minutes:g}"}


def run_local(jobs: Sequence[FoldJob], devices: Sequence[str], watch: Watch | None = None) -> dict[str, str]:
    """Run jobs on this machine, one at a time on each device. One that fails stops no other.

    When this process is interrupted or terminated, trainings have :data:`~.nnunet.SAVE_SECONDS` to save. They end at
    once when it is killed.

    Returns:
        The errors of jobs that failed, by name.
    """
    waiting = deque(jobs)
    status: dict[str, Status] = {job.name: "waiting" for job in jobs}
    errors: dict[str, str] = {}
    stop = threading.Event()

    def work(gpu: str | None) -> None:
        while not stop.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            status[job.name] = "running"
            try:
                job.run(gpu, stop)
                status[job.name] = "done"
            except Exception as error:
                expected = isinstance(error, (MaskSAMError, OSError))
                errors[job.name] = f"{error}\n(log: {job.log})" if expected else traceback.format_exc()
                status[job.name] = "failed"

    # Daemon threads, so that a second Ctrl-C exits at once.
    threads = [threading.Thread(target=work, args=(gpu_of(device),), daemon=True) for device in devices]
    with termination_as_exit():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if watch is not None:
                    watch(dict(status))
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            stop.set()
            running = ", ".join(name for name, one in status.items() if one == "running")
            print(f"ending {running}; trainings may save for {SAVE_SECONDS:.0f} seconds", file=sys.stderr, flush=True)
            for thread in threads:
                thread.join()
            raise
    if watch is not None:
        watch(dict(status))
    return errors


def gpu_of(device: str) -> str | None:
    """The value of ``CUDA_VISIBLE_DEVICES`` for one of ``-device``; None for a device that is no GPU.

    Numbers count among the GPUs that this process may see, as PyTorch's do. ``cuda`` is the first.
    """
    if device in ("cpu", "mps"):
        return None
    number = 0 if device == "cuda" else int(device)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if visible else str(number)


def _resident_mib(process: int) -> float:
    """Resident memory of a process and its children, in MiB; memory that they share counts once for each."""
    with contextlib.suppress(psutil.Error):  # one has just ended
        parent = psutil.Process(process)
        return sum(one.memory_info().rss for one in [parent, *parent.children(recursive=True)]) / 2**20
    return 0.0
