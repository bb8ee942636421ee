"""A benchmark on a SLURM cluster: one job for each fold, then one that evaluates, submitted with submitit."""

from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel
from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from masksam_nnunet.errors import TrainingError, UsageError
from masksam_nnunet.files import write_json
from masksam_nnunet.stop_signals import REQUEUE

from .folds import FoldRecord, locked
from .jobs import FoldJob, Status, Watch
from .nnunet import last_lines

JOB_FILE = "jobs.json"
REQUEUES = 100  # after as many time limits, a job makes no progress
_LOOK_SECONDS = 2.0
_SETTLE_SECONDS = 10.0  # that a result may take through a network file system
_AWAY_SECONDS = 15 * 60.0  # that SLURM may not answer, as while its controller restarts
_OWN_OPTIONS = ("dependency", "requeue", "output", "error", "open_mode", "signal", "array", "time", "job_name")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING")


@dataclass(frozen=True)
class SlurmSettings:
    """What each job asks for. None is the cluster's default."""

    partition: str | None = None
    minutes: int = 24 * 60  # time limit; a job that reaches it is requeued and continues
    gpus: int = 1
    cpus: int = 8
    memory_gb: float | None = None
    options: Mapping[str, str | bool] = field(default_factory=dict)  # further ones of sbatch: account, qos


def parse_slurm_options(options: Sequence[str]) -> dict[str, str | bool]:
    """Parse ``--slurm KEY=VALUE`` and ``--slurm KEY``; a UsageError refuses what the benchmark sets itself."""
    found: dict[str, str | bool] = {}
    for text in options:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not key or (equals and not value):
            raise UsageError(f"--slurm {text!r}: write KEY=VALUE, such as account=lab, or KEY, such as exclusive")
        if key in _OWN_OPTIONS:
            raise UsageError(f"--slurm {text}: the benchmark itself sets {key}; leave it out")
        found[key] = value if equals else True
    return found


@dataclass(frozen=True)
class FoldOnSlurm:
    """A fold as submitit pickles and calls it."""

    job: FoldJob

    def __call__(self) -> None:
        """Run the fold; requeue the job if SLURM has ended the training to pre-empt it."""
        try:
            self.job.run()
        except TrainingError:
            record = FoldRecord.read(self.job.folder)
            ended = record is not None and record.parts and record.parts[-1].exit_status in (-signal.SIGTERM, REQUEUE)
            # A job that its user has cancelled is not running any more for SLURM.
            if ended and jobs_in_queue().get(os.environ["SLURM_JOB_ID"]) == "RUNNING":
                os.kill(os.getpid(), signal.SIGUSR2)  # submitit requeues this job and ends this process
                time.sleep(60)
            raise

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues when the job is pre-empted or reaches its time limit: the same, it continues."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Evaluation:
    """``masksam report`` on a benchmark's folder, with the variables of the process that submits it."""

    folder: Path
    environment: Mapping[str, str]

    def __call__(self) -> None:
        """Run it; a TrainingError repeats what the command says when it fails."""
        command = [sys.executable, "-P", "-m", "masksam_nnunet.cli.app", "report", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(self.environment))
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            raise TrainingError(f"masksam report {self.folder} failed:\n{done.stderr.strip()}")


class Submission(BaseModel):
    """Numbers of SLURM's jobs, kept in the benchmark's folder: of each fold by its name, and of the evaluation."""

    folds: dict[str, str] = {}
    evaluation: str | None = None


class Slurm:
    """Submits folds to SLURM and waits for them. The jobs outlive this process."""

    def __init__(self, folder: Path, settings: SlurmSettings) -> None:
        """Args: the benchmark's folder, on a file system that the cluster shares; what each job asks for.

        Raises:
            UsageError: SLURM is not installed here, or refuses an option.
        """
        self.folder = folder.absolute()
        self.settings = settings
        self._executor("check")

    def submit(self, jobs: Sequence[FoldJob], environment: Mapping[str, str]) -> tuple[Submission, list[str]]:
        """Submit the folds that are not queued or running, then the evaluation, which waits until all have ended.

        Returns:
            All jobs, and the names of the folds that were submitted now.

        Raises:
            TrainingError: SLURM refuses a job; those before it stay submitted and remembered.
        """
        with locked(self.folder, "submitting this benchmark's jobs", 5.0):
            known, queue = self._read(), jobs_in_queue()
            new = [job for job in jobs if known.folds.get(job.name) not in queue]
            for job in new:
                known.folds[job.name] = self._submit(job.name.replace("/", "_"), FoldOnSlurm(job))
                self._write(known)
            if new or known.evaluation not in queue:
                if known.evaluation in queue:  # it would run before the new folds have ended
                    subprocess.run(["scancel", str(known.evaluation)], capture_output=True, check=False)
                queue = jobs_in_queue()
                awaited = [number for job in jobs if (number := known.folds[job.name]) in queue]
                dependency = f"afterany:{':'.join(awaited)}" if awaited else None
                known.evaluation = self._submit("evaluation", Evaluation(self.folder, dict(environment)), dependency)
                self._write(known)
        mine = {job.name: known.folds[job.name] for job in jobs}
        return Submission(folds=mine, evaluation=known.evaluation), [job.name for job in new]

    def wait(self, submission: Submission, watch: Watch | None = None) -> dict[str, str]:
        """Wait until SLURM has no more of these jobs.

        Returns:
            The errors of jobs that failed, by fold; that of the evaluation as ``evaluation``.
        """
        numbers = {**submission.folds, "evaluation": str(submission.evaluation)}
        status: dict[str, Status] = dict.fromkeys(numbers, "waiting")
        errors: dict[str, str] = {}
        gone: dict[str, float] = {}
        while not {*status.values()} <= {"done", "failed"}:
            queue = jobs_in_queue(_AWAY_SECONDS)
            for name, number in numbers.items():
                if number in queue:
                    gone.pop(name, None)
                    status[name] = "waiting" if queue[number] in _WAITING else "running"
                    continue
                if status[name] in ("done", "failed"):
                    continue
                settled = time.monotonic() - gone.setdefault(name, time.monotonic()) > _SETTLE_SECONDS
                if settled or self._job(number).paths.result_pickle.exists():
                    error = self._error(number)
                    status[name] = "done" if error is None else "failed"
                    errors |= {} if error is None else {name: error}
            if watch is not None:
                watch({name: status[name] for name in submission.folds})
            time.sleep(_LOOK_SECONDS)
        return errors

    def _submit(self, name: str, call: FoldOnSlurm | Evaluation, dependency: str | None = None) -> str:
        try:
            return str(self._executor(name, dependency).submit(call).job_id)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise TrainingError(
                f"SLURM refuses the job for {name}: {str(error).strip()}. Correct --partition, --hours, "
                "--gpus, --cpus, --memory or --slurm, then run again"
            ) from error

    def _executor(self, name: str, dependency: str | None = None) -> SlurmExecutor:
        wanted = self.settings
        try:
            executor = SlurmExecutor(self.folder / "slurm" / "%j", max_num_timeout=REQUEUES)
            executor.update_parameters(  # submitit leaves out what is None
                job_name=name,
                time=wanted.minutes,
                cpus_per_task=wanted.cpus,
                srun_args=[f"--cpus-per-task={wanted.cpus}"],  # since SLURM 22.05 not taken over from sbatch
                # Pre-emption needs "requeue" where it is not the cluster's default.
                additional_parameters={**wanted.options, "requeue": True},
                partition=wanted.partition,
                gpus_per_node=wanted.gpus or None,
                mem=wanted.memory_gb and f"{int(wanted.memory_gb * 1024)}M",
                dependency=dependency,
            )
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"--executor slurm: {error} Without sbatch and srun use --executor local") from error
        return executor

    def _job(self, number: str) -> SlurmJob[object]:
        return SlurmJob(folder=self.folder / "slurm" / "%j", job_id=number, tasks=[0])

    def _error(self, number: str) -> str | None:
        """Why a job that has ended failed; None if it did not."""
        job = self._job(number)
        if not job.paths.result_pickle.exists():
            end = "\n".join(last_lines(job.paths.stderr))
            return (
                f"SLURM's job {number} ended without a result: killed, cancelled, or out of memory or time. "
                f"The end of {job.paths.stderr}:\n{end}\nRun again to continue from the last checkpoint."
            )
        error = job.exception()
        if error is None:
            return None
        # submitit gives a traceback as text. Of our own errors the message is enough.
        own = re.split(r"masksam_nnunet\.errors\.\w+: ", str(error))
        return own[-1].partition("\n-----")[0].strip() if len(own) > 1 else str(error).strip()

    def _read(self) -> Submission:
        file = self.folder / JOB_FILE
        try:
            return Submission.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return Submission()
        except (OSError, ValueError) as error:
            raise TrainingError(f"{file} is damaged ({error}); cancel this benchmark's jobs and remove it") from error

    def _write(self, submission: Submission) -> None:
        try:
            write_json(self.folder / JOB_FILE, submission.model_dump())
        except OSError as error:
            raise TrainingError(f"cannot write {self.folder / JOB_FILE}: {error}; look at squeue, make room") from error


def jobs_in_queue(patience: float = 0.0) -> dict[str, str]:
    """The state of each of this user's jobs that SLURM has not finished, by number. Needs no accounting database.

    Raises:
        TrainingError: SLURM has not answered for ``patience`` seconds.
    """
    until = time.monotonic() + patience
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T"]
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)
        except (OSError, subprocess.SubprocessError) as error:
            if time.monotonic() >= until:
                said = getattr(error, "stderr", None) or str(error)
                raise TrainingError(f"SLURM does not answer ({said.strip()}); jobs remain: run again later") from error
        time.sleep(15)
