"""``masksam benchmark`` and ``masksam report``: missing folds are trained, then all are evaluated."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from masksam_nnunet.environment import variable
from masksam_nnunet.errors import DataError, TrainingError
from masksam_nnunet.files import read_json
from masksam_nnunet.gpu import require_devices
from masksam_nnunet.inference.report.html import number
from masksam_nnunet.inference.scoring import cases_in
from masksam_nnunet.plans.raw_data import find_dataset

from .definition import FOLDERS, Benchmark
from .evaluate import evaluate
from .folds import FoldRecord, Stage, locked
from .jobs import FoldJob, budget_variables, gpu_of, run_local
from .progress import Progress
from .results import MEAN, METRICS
from .slurm import Slurm, SlurmSettings

EVALUATION_SECONDS = 6 * 3600
"""How long an evaluation waits for another one of the same dataset, whose models they share."""


def run_benchmark(
    benchmark: Benchmark, out: Path | None, devices: Sequence[str], console: Console | None = None
) -> Path:
    """Train any missing folds on this machine, evaluate, and write the report; the path of report.html.

    Args:
        benchmark: what to compare.
        out: the benchmark's folder; None is a folder beside the trained models.
        devices: as ``-device``.
        console: for progress.

    Raises:
        MaskSAMError: bad input, before anything is trained.
        TrainingError: some folds failed; all others are kept.
    """
    console = console or Console()
    out = out or _default_folder(benchmark)
    require_devices(devices)
    _check(benchmark, console)
    with locked(out, "running this benchmark"):
        missing = _begin(benchmark, out, console)
        with Progress(console, missing) as progress:
            errors = run_local(missing, devices, progress.show)
        raise_failures(errors)
        with variable("CUDA_VISIBLE_DEVICES", gpu_of(devices[0]) or os.environ.get("CUDA_VISIBLE_DEVICES")):
            return report(out, console)


def submit_benchmark(
    benchmark: Benchmark, out: Path | None, settings: SlurmSettings, wait: bool, console: Console | None = None
) -> Path | None:
    """Submit any missing folds, and the evaluation after them, to SLURM; arguments and errors as run_benchmark's.

    With ``wait`` it stays until all jobs have ended, and returns report.html.
    """
    console = console or Console()
    out = out or _default_folder(benchmark)
    cluster = Slurm(out, settings)
    _check(benchmark, console)
    missing = _begin(benchmark, out, console)
    submission, new = cluster.submit(missing, benchmark.environment())
    console.print(f"submitted {len(new)} jobs; the evaluation is SLURM's job {submission.evaluation}", highlight=False)
    if not wait:
        return None
    with Progress(console, missing) as progress:
        errors = cluster.wait(submission, progress.show)
    raise_failures(errors)
    return out / "report.html"


def _default_folder(benchmark: Benchmark) -> Path:
    return benchmark.results / f"benchmark_{benchmark.configuration}"


def _check(benchmark: Benchmark, console: Console) -> None:
    for note in benchmark.check():
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _begin(benchmark: Benchmark, out: Path, console: Console) -> list[FoldJob]:
    """Write the definition; the folds that are not done."""
    benchmark.write(out)
    jobs = benchmark.jobs()
    missing = [job for job in jobs if job.state().stage is not Stage.DONE]
    done = len(jobs) - len(missing)
    console.print(f"{done} of {len(jobs)} folds are done, {len(missing)} to train or finish", highlight=False)
    return missing


def raise_failures(errors: Mapping[str, str]) -> None:
    """Raise a TrainingError for jobs that failed, by name, if there are any."""
    if errors:
        listed = "\n\n".join(f"{name} failed:\n{error}" for name, error in errors.items())
        raise TrainingError(f"{listed}\n\nWhat was finished is kept. Run the same command again to continue.")


def report(out: Path, console: Console | None = None, accept_unfair: bool | None = None) -> Path:
    """Evaluate a benchmark from its trained folds and write its report.

    Raises:
        MaskSAMError: some folds are not done, the comparison is not fair, or the data cannot be read.
    """
    benchmark = Benchmark.read(out)
    if accept_unfair is not None:
        benchmark = benchmark.model_copy(update={"accept_unfair": accept_unfair})
    find_dataset(benchmark.dataset, FOLDERS)
    try:
        ending = read_json(benchmark.preprocessed / "dataset.json")["file_ending"]
        jobs = benchmark.jobs()
        states = [(job, job.state()) for job in jobs]
    except (OSError, ValueError, LookupError, TypeError) as error:
        files = f"dataset.json or splits_final.json in {benchmark.preprocessed}"
        raise DataError(f"{files} is damaged or has no such fold ({error!r}); restore it") from error
    undone = [f"- {job.name}: {s.stage.value}; {s.reason}" for job, s in states if s.stage is not Stage.DONE]
    if undone:
        raise TrainingError("\n".join(["not all folds are done; run masksam benchmark again:", *undone]))
    commands = [f"export {name}={shlex.quote(value)}" for name, value in sorted(jobs[0].environment.items())]
    commands += [line for job in jobs for line in _commands(job)]
    commands += [f"# All of that, and the evaluation by nnU-Net's functions: {benchmark.command_line}"]
    with locked(benchmark.results, "evaluating this dataset's models", EVALUATION_SECONDS, "evaluation.lock"):
        patients = benchmark.patients(cases_in(benchmark.preprocessed / "gt_segmentations", ending))
        page = evaluate(benchmark, out, commands, patients, console)
    _print_means(out, console or Console())
    return page


def _print_means(out: Path, console: Console) -> None:
    """Print each row's means over classes and cases."""
    means = pd.read_csv(out / "aggregates.csv")
    means = means[(means["class"] == MEAN) & (means["kind"] != "postprocessed")]
    table = Table(Column("mean over cases", overflow="fold"))
    for metric in METRICS.values():
        table.add_column(escape(metric.heading))  # rich would take "[mm]" for markup
    for name, values in means.pivot(index="method", columns="metric", values="mean")[list(METRICS)].iterrows():
        table.add_row(escape(str(name)), *map(number(3), values))
    console.print(table)


def _commands(job: FoldJob) -> list[str]:
    """What trained a fold, as recorded."""
    record = FoldRecord.read(job.folder)
    if record is None:
        return [f"# {job.name}: trained outside the benchmark"]
    budget = "".join(f"{k}={v} " for k, v in budget_variables(record.minutes, record.iterations).items())
    return [budget + part.command for part in record.parts]
