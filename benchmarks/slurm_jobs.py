"""The grid on a SLURM cluster: one job for each fold, then one that evaluates, through submitit."""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import FailedJobError, FailedSubmissionError

from masksam_nnunet.errors import BenchmarkError

from .executors import GridJob, Outcome, Status, Watch, outcome_of
from .job_file import SubmittedJobs

REQUEUES = 100
"""How often a job may reach its time limit and go on; more would hide a job that makes no progress."""
_LOOK_SECONDS = 2.0
_SETTLE_SECONDS = 10.0
_AWAY_SECONDS = 15 * 60.0
_RETRY_SECONDS = 15.0
_OWN_OPTIONS = ("dependency", "requeue", "output", "error", "open_mode", "signal", "array", "time", "job_name")


@dataclass(frozen=True)
class SlurmSettings:
    """What each job asks for.

    Attributes:
        partition: None for the cluster's default.
        minutes: time limit; a job that reaches it is requeued and goes on.
        gpus: for each job.
        cpus: for each job.
        memory_gb: None for the cluster's default.
        options: further options of sbatch, by their long names without dashes: ``account``, ``qos``, ``constraint``.
    """

    partition: str | None = None
    minutes: int = 24 * 60
    gpus: int = 1
    cpus: int = 8
    memory_gb: float | None = None
    options: Mapping[str, str | bool] = field(default_factory=dict)

    def parameters(self, job_name: str) -> dict[str, Any]:
        """For submitit's executor."""
        own: dict[str, Any] = {
            "job_name": job_name,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            # Since SLURM 22.05 srun does not take it over from sbatch.
            "srun_args": [f"--cpus-per-task={self.cpus}"],
        }
        if self.partition is not None:
            own["partition"] = self.partition
        if self.gpus:
            own["gpus_per_node"] = self.gpus
        if self.memory_gb is not None:
            own["mem"] = f"{int(self.memory_gb * 1024)}M"
        # "requeue" is what pre-emption needs where it is not the cluster's default.
        return own | {"additional_parameters": {**self.options, "requeue": True}}


def parse_slurm_options(options: Sequence[str]) -> dict[str, str | bool]:
    """The values of ``--slurm KEY=VALUE`` and the flags ``--slurm KEY``.

    Raises:
        BenchmarkError: not of that form, or what the benchmark sets itself.
    """
    found = {}
    for text in options:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not key or (equals and not value):
            raise BenchmarkError(
                f"--slurm {text!r}: write KEY=VALUE with sbatch's long names, such as account=lab, or KEY alone for a "
                "flag, such as exclusive"
            )
        if key in _OWN_OPTIONS:
            raise BenchmarkError(f"--slurm {text}: {key} is set by the benchmark itself; leave it out")
        found[key] = value if equals else True
    return found


@dataclass(frozen=True)
class InEnvironment:
    """A callable with the variables of nnU-Net and MaskSAM of the process that made it."""

    call: Callable[[], object]
    environment: Mapping[str, str]

    @classmethod
    def of_this_process(cls, call: Callable[[], object]) -> InEnvironment:
        """With this process's variables."""
        return cls(call, {k: v for k, v in os.environ.items() if k.startswith(("nnUNet_", "MASKSAM_"))})

    def __call__(self) -> object:
        os.environ.update(self.environment)
        return self.call()


@dataclass(frozen=True)
class Submission:
    """What SLURM was given now or before.

    Attributes:
        folds: SLURM's job by the name of ours.
        new: names of those that were submitted now.
        evaluation: SLURM's job that evaluates at the end, if any.
    """

    folds: Mapping[str, str]
    new: tuple[str, ...]
    evaluation: str | None


class SlurmGrid:
    """Submits jobs to SLURM and waits for them; they outlive this process."""

    def __init__(self, folder: Path, settings: SlurmSettings) -> None:
        """Args: the benchmark's folder, on a file system that the cluster shares; what each job asks for.

        Raises:
            BenchmarkError: if SLURM is not installed here, or an option is not one of submitit's.
        """
        self.folder = folder.absolute()
        self.settings = settings
        self._executor("check")

    def run(
        self, jobs: Sequence[GridJob], evaluate: Callable[[], object] | None = None, watch: Watch | None = None
    ) -> tuple[Outcome, ...]:
        """See :class:`~.executors.GridExecutor`; returns when SLURM has no more of these jobs."""
        submission = self.submit(jobs, evaluate)
        return self.wait(jobs, submission, watch)

    def submit(self, jobs: Sequence[GridJob], evaluate: Callable[[], object] | None = None) -> Submission:
        """Submit those jobs that are not queued or running, then one that evaluates when all have ended.

        Raises:
            BenchmarkError: if SLURM refuses one; those before it stay submitted and remembered.
        """
        with SubmittedJobs.opened(self.folder) as remembered:
            there = jobs_in_queue()
            under_way = {name: number for name, number in remembered.folds.items() if number in there}
            new = [job for job in jobs if job.name not in under_way]
            for count, job in enumerate(new):
                try:
                    submitted = self._executor(job.name.replace("/", "_")).submit(job.on(None))
                except (FailedJobError, FailedSubmissionError, OSError) as error:
                    raise BenchmarkError(_refused(job.name, error, count, len(new))) from error
                remembered.folds[job.name] = submitted.job_id
                remembered.write()
            mine = {job.name: remembered.folds[job.name] for job in jobs}
            if evaluate is not None and (new or remembered.evaluation not in there):
                self._submit_evaluation(evaluate, mine, remembered, there)
            return Submission(mine, tuple(job.name for job in new), remembered.evaluation)

    def wait(self, jobs: Sequence[GridJob], submission: Submission, watch: Watch | None = None) -> tuple[Outcome, ...]:
        """Wait until SLURM has no more of these jobs, the evaluation among them."""
        outcomes: dict[str, Outcome] = {}
        numbers = {*submission.folds.values()} | ({submission.evaluation} - {None})
        gone: dict[str, float] = {}
        while True:
            there = _queue_in_time()
            for job in jobs:
                number = submission.folds[job.name]
                if number in there:
                    gone.pop(job.name, None)
                elif job.name not in outcomes:
                    outcome = outcome_of(job, self._job(number))
                    # A result that is on its way through a network file system needs a moment.
                    if outcome.error is None or time.monotonic() - gone.setdefault(job.name, time.monotonic()) > (
                        _SETTLE_SECONDS
                    ):
                        outcomes[job.name] = outcome
            if watch is not None:
                watch({job.name: _status(job.name, submission.folds[job.name], there, outcomes) for job in jobs})
            if len(outcomes) == len(jobs) and not numbers & set(there):
                return tuple(outcomes[job.name] for job in jobs)
            time.sleep(_LOOK_SECONDS)

    def evaluation_error(self, submission: Submission) -> str | None:
        """Why the evaluation failed; None if it did not, or there was none."""
        if submission.evaluation is None:
            return None
        submitted = self._job(submission.evaluation)
        until = time.monotonic() + _SETTLE_SECONDS
        while not submitted.paths.result_pickle.exists() and time.monotonic() < until:  # on its way, as above
            time.sleep(_LOOK_SECONDS)
        return outcome_of(_Evaluation(submitted.paths.stderr), submitted).error

    def _submit_evaluation(
        self,
        evaluate: Callable[[], object],
        folds: Mapping[str, str],
        remembered: SubmittedJobs,
        there: Mapping[str, str],
    ) -> None:
        if remembered.evaluation in there:  # it would run before the new folds have ended
            subprocess.run(["scancel", str(remembered.evaluation)], capture_output=True, check=False)
        queued = jobs_in_queue()
        awaited = [number for number in folds.values() if number in queued]
        dependency = f"afterany:{':'.join(awaited)}" if awaited else None
        try:
            executor = self._executor("masksam_evaluation", dependency)
            submitted = executor.submit(InEnvironment.of_this_process(evaluate))
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise BenchmarkError(_refused("the evaluation", error, len(folds), len(folds))) from error
        remembered.evaluation = submitted.job_id
        remembered.write()

    def _executor(self, name: str, dependency: str | None = None) -> SlurmExecutor:
        parameters = self.settings.parameters(name)
        if dependency is not None:
            parameters["dependency"] = dependency
        try:
            executor = SlurmExecutor(self._submitit_folder, max_num_timeout=REQUEUES)
            executor.update_parameters(**parameters)
        except (RuntimeError, ValueError) as error:
            raise BenchmarkError(
                f"--executor slurm: {error} Run this where sbatch and srun are installed, or use --executor local"
            ) from error
        return executor

    def _job(self, number: str) -> SlurmJob[object]:
        return SlurmJob(folder=self._submitit_folder, job_id=number, tasks=[0])

    @property
    def _submitit_folder(self) -> Path:
        return self.folder / "slurm" / "%j"


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation under the interface of jobs, for its outcome."""

    log: Path
    name: str = "evaluation"

    def on(self, gpu: str | None) -> _Evaluation:
        return self

    def __call__(self) -> object:
        return None


def jobs_in_queue() -> Mapping[str, str]:
    """State of each of this user's jobs that SLURM has not finished with, by number.

    By squeue, which needs no accounting database.

    Raises:
        BenchmarkError: if SLURM does not answer.
    """
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        raise BenchmarkError(
            f"SLURM does not answer ({' '.join(command)}: {told.strip()}); jobs that were submitted stay so: run again "
            "when it does"
        ) from error
    lines = [line.strip().split("|") for line in done.stdout.splitlines() if "|" in line]
    return {number: state for number, state in lines}


def _queue_in_time() -> Mapping[str, str]:
    """The queue, from a SLURM that is away for up to :data:`_AWAY_SECONDS`, as while its controller restarts."""
    until = time.monotonic() + _AWAY_SECONDS
    while True:
        try:
            return jobs_in_queue()
        except BenchmarkError:
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY_SECONDS)


def _status(name: str, number: str, there: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> Status:
    if name in outcomes:
        return Status.DONE if outcomes[name].error is None else Status.FAILED
    waits: Collection[str] = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING")
    return Status.WAITING if there.get(number, "COMPLETING") in waits else Status.RUNNING


def _refused(name: str, error: BaseException, before: int, number: int) -> str:
    return (
        f"SLURM refuses the job for {name}: {str(error).strip()}. Check --partition, --time, --gpus, --cpus, --mem and "
        f"--slurm. Submitted before it: {before} of {number} fold jobs, which stay submitted; run again for the rest"
    )
