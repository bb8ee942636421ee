"""Bring one fold to its end through nnU-Net's own command, from wherever it stands."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from masksam_nnunet.environment import BUDGET_MINUTES
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json

from .commands import SAVE_SECONDS, CommandError, run_logged
from .fold_record import PROCESS_FILE, FoldRecord, Inputs, PartKind
from .fold_state import FoldState, Stage, fold_state
from .locks import locked
from .results import Method
from .slurm_jobs import jobs_in_queue

LOG_FILE = "benchmark_train.log"
COMMAND = "nnUNetv2_train"
_OPTIONS: Mapping[PartKind, tuple[str, ...]] = {"train": (), "continue": ("--c",), "validate": ("--val",)}
_PARTS: Mapping[Stage, PartKind] = {Stage.MISSING: "train", Stage.BROKEN_OFF: "continue", Stage.TRAINED: "validate"}
_ROOM = 2**30
"""Bytes free, at which a failure is likely to be for lack of room."""
LEFT_BEHIND_SECONDS = SAVE_SECONDS + 5
"""A training that its benchmark has left behind ends within these."""
_SUBMITIT_EXECUTOR = "SUBMITIT_EXECUTOR"
_SUBMITIT_SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"


@dataclass(frozen=True)
class FoldJob:
    """A call brings the fold to its end; picklable, so that submitit can run it elsewhere.

    Attributes:
        dataset: full name.
        method: what to train.
        fold: number.
        device: ``cpu``, ``cuda`` or ``mps``.
        environment: variables of nnU-Net and MaskSAM that the training needs, its three folders among them; they
            travel with the job, whatever the cluster does with variables.
        gpu: the GPU to use, as ``CUDA_VISIBLE_DEVICES`` names it; None leaves the choice to who starts the job.
        minutes: of a time-budget trainer, else None.
        npz: whether to save validation's probabilities.
    """

    dataset: str
    method: Method
    fold: int
    device: str
    environment: Mapping[str, str]
    gpu: str | None = None
    minutes: float | None = None
    npz: bool = False

    @property
    def name(self) -> str:
        """For people and for the file of submitted jobs."""
        return f"{self.method.key}/fold_{self.fold}"

    @property
    def folder(self) -> Path:
        """The fold's folder in nnUNet_results."""
        return Path(self.environment["nnUNet_results"]) / self.dataset / self.method.key / f"fold_{self.fold}"

    @property
    def log(self) -> Path:
        """Where the output of nnU-Net's command is gathered."""
        return self.folder / LOG_FILE

    @property
    def cases(self) -> list[str]:
        """The fold's validation cases."""
        cases: list[str] = read_json(self._preprocessed / "splits_final.json")[self.fold]["val"]
        return cases

    def on(self, gpu: str | None) -> FoldJob:
        """The same job on this GPU."""
        return replace(self, gpu=gpu)

    def state(self) -> FoldState:
        """How far the fold has come."""
        ending = read_json(self._preprocessed / "dataset.json")["file_ending"]
        return fold_state(self.folder, self.cases, ending, self.npz)

    def changes(self) -> list[str]:
        """What is not now as it was when the fold's training began, in words; nothing where that was not recorded."""
        record = FoldRecord.read(self.folder)
        if record is None:
            return []
        try:
            inputs = Inputs.read(self._preprocessed, self.method.plans)
        except OSError as error:
            return [f"{error.filename} cannot be read ({error.strerror})"]
        return record.differences(self.method, self.minutes, inputs)

    def __call__(self) -> str:
        """Train, go on, or validate, until the fold is done; returns how that was told.

        Raises:
            BenchmarkError: with the end of the log where nnU-Net's command failed; if a checkpoint is damaged; if
                another process trains the fold; if splits, plans or minutes changed since the training began.
        """
        with locked(self.folder, "another process is training this fold", LEFT_BEHIND_SECONDS):
            tried: set[Stage] = set()
            while (state := self.state()).stage is not Stage.DONE:
                if state.stage is Stage.DAMAGED:
                    raise BenchmarkError(state.reason)
                if state.stage in tried:
                    raise BenchmarkError(
                        f"{self.name}: {COMMAND} ended without an error, but the fold is still {state.stage.value}: "
                        f"{state.reason}; see {self.log}"
                    )
                tried.add(state.stage)
                self._run(state.stage)
        return state.reason

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues when the job is pre-empted or its time is over: the same, it finds its place."""
        return DelayedSubmission(self)

    @property
    def _preprocessed(self) -> Path:
        return Path(self.environment["nnUNet_preprocessed"]) / self.dataset

    def _run(self, stage: Stage) -> None:
        part = _PARTS[stage]
        method = self.method
        options = [*_OPTIONS[part], *(["--npz"] if self.npz else [])]
        arguments = [self.dataset, method.configuration, str(self.fold), "-tr", method.trainer, "-p", method.plans]
        arguments += ["-device", self.device, *options]
        line = shlex.join([COMMAND, *arguments])
        record = self._record(stage)
        environment = self._whole_environment()
        record.begin_part(part, line, environment)
        process = [str(self.folder / PROCESS_FILE), str(os.getpid()), COMMAND]
        module = "masksam_nnunet.benchmarks.nnunet_process"
        exit_status: int | None = None
        try:
            with _noted(signal.SIGTERM) as terminated:
                run_logged(
                    line,
                    [sys.executable, "-m", module, *process, *arguments],
                    environment,
                    self.log,
                    # SLURM signals all processes of a job; only submitit's shall act on it, and then ends the training.
                    shielded_from=[preemption_signal()],
                    catch_sigterm=_SUBMITIT_EXECUTOR not in os.environ,
                    end_with=signal.SIGUSR1,  # MaskSAM's trainers save and exit
                )
            exit_status = 0
        except CommandError as error:
            exit_status = error.code
            if terminated.is_set() and self._on_slurm:
                requeue_if_running()
            raise BenchmarkError(f"{self.name}: {error}{_little_room(self.folder)}") from error
        finally:
            record.end_part(exit_status)

    def _record(self, stage: Stage) -> FoldRecord:
        """The fold's record, checked against what is there now."""
        inputs = Inputs.read(self._preprocessed, self.method.plans)
        record = FoldRecord.read(self.folder)
        if stage is Stage.MISSING:
            parts = [] if record is None else record.parts
            return FoldRecord(self.folder, *self._names, self.minutes, inputs, parts=parts)
        if record is None:  # begun outside the benchmark
            return FoldRecord(self.folder, *self._names, self.minutes, None)
        differences = record.differences(self.method, self.minutes, inputs)
        if differences:
            raise BenchmarkError(changed_since(self.folder, differences))
        return record

    @property
    def _on_slurm(self) -> bool:
        return os.environ.get(_SUBMITIT_EXECUTOR) == "slurm"

    @property
    def _names(self) -> tuple[str, str, str]:
        return self.method.trainer, self.method.plans, self.method.configuration

    def _whole_environment(self) -> dict[str, str]:
        environment = os.environ | dict(self.environment) | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("nnUNet_def_n_proc", str(min(8, os.cpu_count() or 1)))
        if self.device == "cpu":
            environment.setdefault("nnUNet_n_proc_DA", "0")  # the training itself uses every core
        if self.minutes is not None:
            environment[BUDGET_MINUTES] = f"{self.minutes:g}"
            environment.setdefault("nnUNet_compile", "f")  # compiling would eat into the budget of who does it
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        return environment


def _little_room(folder: Path) -> str:
    """What to add to an error where the disk is nearly full: then the log, on the same disk, may not say so."""
    free = shutil.disk_usage(folder).free
    if free > _ROOM:
        return ""
    return f"\nOnly {free / 2**20:.0f} MiB are free where {folder} is: make room"


@contextmanager
def _noted(number: signal.Signals) -> Iterator[threading.Event]:
    """Whether a signal comes; who handles it still does."""
    came = threading.Event()
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield came
        return

    def note(*arguments: Any) -> None:
        came.set()
        before(*arguments)

    signal.signal(number, note)
    try:
        yield came
    finally:
        signal.signal(number, before)


def requeue_if_running() -> None:
    """Have submitit requeue this SLURM job, of which SLURM has ended the training by SIGTERM: it will pre-empt it.

    A job that its user has cancelled is not running any more for SLURM, and stays so. Does not return if it requeues.
    """
    if jobs_in_queue().get(os.environ["SLURM_JOB_ID"]) == "RUNNING":
        os.kill(os.getpid(), preemption_signal())
        time.sleep(60)  # submitit's handler ends this process


def preemption_signal() -> signal.Signals:
    """What submitit takes for pre-emption and the end of time."""
    return signal.Signals[f"SIG{os.environ.get(_SUBMITIT_SIGNAL, 'USR2')}"]


def changed_since(folder: Path, differences: list[str]) -> str:
    """What to tell the user of a fold that was begun with other inputs."""
    return (
        f"{folder}: {'; '.join(differences)}. Restore what was, or remove or move that folder away to train the fold "
        "anew"
    )
