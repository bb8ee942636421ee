"""What runs a grid's jobs: one interface for this machine and for a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from submitit import Job

from .commands import last_lines

FOREVER_MINUTES = 60 * 24 * 365


class Status(Enum):
    """Where a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class GridJob(Protocol):
    """What a job must be: :class:`~.train_fold.FoldJob` is one. It is pickled."""

    @property
    def name(self) -> str:
        """Unique in its grid."""

    @property
    def log(self) -> Path:
        """Its own log; need not exist."""

    def on(self, gpu: str | None) -> GridJob:
        """The same job on this GPU; None: not on one that we choose."""

    def __call__(self) -> object:
        """Do it."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    name: str
    error: str | None
    """None if it succeeded."""
    log: Path


Watch = Callable[[Mapping[str, Status]], None]
"""Called about twice a second with where each job is, by name."""


class GridExecutor(Protocol):
    """Runs jobs; one that fails stops no other."""

    def run(
        self, jobs: Sequence[GridJob], evaluate: Callable[[], object] | None = None, watch: Watch | None = None
    ) -> tuple[Outcome, ...]:
        """Run all jobs, then ``evaluate``, however they ended; it is pickled where jobs run elsewhere.

        Returns:
            one outcome for each job, in their order.

        Raises:
            BenchmarkError: if jobs cannot be started at all.
        """


def outcome_of(job: GridJob, submitted: Job[object]) -> Outcome:
    """How a job that is no more under way ended, by what submitit finds of it."""
    if not submitted.paths.result_pickle.exists():
        end = "\n".join(f"    {line}" for line in last_lines(submitted.paths.stderr))
        told = (
            f"{job.name}: the job {submitted.job_id} ended without a result (killed, cancelled, out of memory or of "
            f"time). The end of {submitted.paths.stderr}:\n{end}\nRun again to go on from the last checkpoint."
        )
        return Outcome(job.name, told, job.log)
    error = submitted.exception()
    return Outcome(job.name, None if error is None else _message(str(error)), job.log)


def _message(trace: str) -> str:
    """A BenchmarkError's own words where a trace ends with one, else the trace's end."""
    _, error, words = trace.rpartition("BenchmarkError: ")
    if error:
        return words.partition("\n----------------------")[0].strip()
    return "\n".join(trace.strip().splitlines()[-20:])


def failures(outcomes: Sequence[Outcome]) -> str:
    """Jobs that failed, each with its error, for people; empty if none."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    return "\n\n".join(f"{outcome.name} failed (log: {outcome.log}):\n{outcome.error}" for outcome in failed)
