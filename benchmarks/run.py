"""``masksam benchmark`` and ``masksam report``: what lacks is trained, then all is evaluated."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from masksam_nnunet.environment import BUDGET_MINUTES
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.methods import parse_methods
from masksam_nnunet.inference.scoring import cases_in

from .evaluate import evaluate
from .executors import Outcome, failures
from .fairness_splits import chosen_splits
from .files import read_or_refuse
from .fold_record import FoldRecord
from .fold_state import Stage
from .grid import Grid, check_grid, find_benchmark_dataset, grid_jobs
from .local_jobs import LocalGrid, device_kind
from .locks import locked
from .progress import GridProgress
from .report_job import ReportJob
from .results import Method
from .slurm_jobs import SlurmGrid, SlurmSettings
from .train_fold import FoldJob

DEFINITION_FILE = "benchmark.json"


@dataclass(frozen=True)
class Definition:
    """What a benchmark's folder is about, kept in its benchmark.json."""

    grid: Grid
    ensembles: bool = True
    accept_unfair: bool = False
    processes: int = 2

    def write(self, out: Path) -> None:
        """Write it over an earlier one: methods and folds may be others, dataset and configuration may not.

        Raises:
            BenchmarkError: ``out`` is another dataset's or configuration's, or cannot be written.
        """
        if (out / DEFINITION_FILE).is_file():
            there = Definition.read(out).grid
            if (there.dataset, there.configuration) != (self.grid.dataset, self.grid.configuration):
                raise BenchmarkError(
                    f"--out {out} holds a benchmark of {there.dataset}, {there.configuration}; give another folder"
                )
        try:
            write_json(out / DEFINITION_FILE, asdict(self))
        except OSError as error:
            raise BenchmarkError(f"--out {out} cannot be written: {error}; make room or give another folder") from error

    @classmethod
    def read(cls, out: Path) -> Definition:
        """Read what :meth:`write` wrote.

        Raises:
            BenchmarkError: there is none, or it is not whole.
        """
        file = out / DEFINITION_FILE
        try:
            content: dict[str, Any] = read_json(file)
            grid = content.pop("grid")
            grid["methods"] = tuple(Method(**method) for method in grid["methods"])
            grid["folds"] = tuple(grid["folds"])
            return cls(Grid(**grid), **content)
        except FileNotFoundError as error:
            raise BenchmarkError(
                f"{out} is no benchmark's folder: it has no {DEFINITION_FILE}; masksam benchmark makes one"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{file} is not readable ({error!r}); remove it and run masksam benchmark again"
            ) from error


def define(
    dataset: str,
    configuration: str,
    trainers: Sequence[str],
    plans: Sequence[str],
    folds: Sequence[int],
    minutes: float | None,
    devices: Sequence[str],
    ensembles: bool,
    accept_unfair: bool,
    processes: int,
    group: str | None = None,
) -> Definition:
    """A benchmark from what the command line says.

    Raises:
        BenchmarkError: unknown dataset, trainers, plans or devices.
    """
    name = find_benchmark_dataset(dataset)
    methods = parse_methods(trainers, plans, configuration)
    ensembles = ensembles and len(methods) > 1
    grid = Grid(name, configuration, methods, tuple(folds), minutes, device_kind(devices), npz=ensembles, group=group)
    return Definition(grid, ensembles, accept_unfair, processes)


def default_folder(definition: Definition) -> Path:
    """Beside the trained models."""
    return definition.grid.results / f"benchmark_{definition.grid.configuration}"


def run_benchmark(
    definition: Definition,
    out: Path,
    devices: Sequence[str],
    slurm: SlurmSettings | None = None,
    wait: bool = True,
    console: Console | None = None,
) -> Path | None:
    """Train what lacks, evaluate, and write the report.

    Args:
        definition: what to compare.
        out: the benchmark's folder.
        devices: as ``--devices``, for this machine.
        slurm: what to ask a cluster for; None trains here.
        wait: on a cluster, whether to stay until all jobs have ended.
        console: where progress is told.

    Returns:
        report.html; None if the cluster has not been waited for.

    Raises:
        BenchmarkError: bad input, before anything is trained; at the end, folds that failed, all others kept.
    """
    console = console or Console()
    grid = definition.grid
    for note in check_grid(grid, definition.accept_unfair):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    executor = SlurmGrid(out, slurm) if slurm else LocalGrid(out / "jobs", devices)
    definition.write(out)
    waiting = [job for job in grid_jobs(grid) if job.state().stage is not Stage.DONE]
    total = len(grid.methods) * len(grid.folds)
    console.print(
        f"{total - len(waiting)} of {total} folds are done, {len(waiting)} to train or finish", highlight=False
    )
    outcomes: tuple[Outcome, ...]
    with GridProgress(console, waiting) as progress:
        if isinstance(executor, SlurmGrid):
            submission = executor.submit(waiting, ReportJob(out.absolute()))
            console.print(
                f"submitted {len(submission.new)} jobs; the evaluation is SLURM's job {submission.evaluation}",
                highlight=False,
            )
            if not wait:
                return None
            outcomes = executor.wait(waiting, submission, progress.show)
            error = executor.evaluation_error(submission)
        else:
            outcomes, error = executor.run(waiting, watch=progress.show), None
    _raise_failures(outcomes, out)
    if error is not None:
        raise BenchmarkError(error)
    return report(out, console) if slurm is None else out / "report.html"


def report(out: Path, console: Console | None = None, accept_unfair: bool | None = None) -> Path:
    """Evaluate a benchmark's folder anew and write its report.

    Raises:
        BenchmarkError: folds that are not done, and all that :func:`~.evaluate.evaluate` raises.
    """
    definition = Definition.read(out)
    if accept_unfair is not None:
        definition = replace(definition, accept_unfair=accept_unfair)
    grid = definition.grid
    find_benchmark_dataset(grid.dataset)  # whether training began with what is there now is for fairness to judge
    ending = _check_preprocessed(grid)
    jobs = grid_jobs(grid)
    undone = [(job, state) for job in jobs if (state := job.state()).stage is not Stage.DONE]
    if undone:
        told = [
            f"- {job.name}: {'; '.join([state.stage.value, state.reason, *job.changes()])}" for job, state in undone
        ]
        raise BenchmarkError("not all folds are done; run masksam benchmark again:\n" + "\n".join(told))
    commands = [f"export {name}={shlex.quote(value)}" for name, value in sorted(jobs[0].environment.items())]
    commands += _commands(jobs)
    commands += [f"# All of that, and the evaluation by nnU-Net's functions: {command_line(definition)}"]
    with locked(grid.results, "another process is evaluating this dataset's models", wait=1.0):
        return evaluate(
            grid.dataset,
            grid.configuration,
            grid.methods,
            grid.folds,
            out,
            ensembles=definition.ensembles,
            accept_unfair=definition.accept_unfair,
            device=grid.device,
            processes=definition.processes,
            commands=commands,
            patients=grid.patients(cases_in(grid.preprocessed / "gt_segmentations", ending)),
            console=console,
        )


def command_line(definition: Definition) -> str:
    """The benchmark's command on one machine; workers and folder, which change no result, are left out."""
    grid = definition.grid
    words = ["masksam", "benchmark", "-d", grid.dataset, "-c", grid.configuration]
    words += ["--trainers", *(f"{method.trainer}@{method.plans}" for method in grid.methods)]
    words += ["--folds", *map(str, grid.folds)]
    words += [] if grid.minutes is None else ["--minutes", f"{grid.minutes:g}"]
    words += ["--devices", grid.device]
    words += ["--no-ensembles"] if not definition.ensembles and len(grid.methods) > 1 else []
    words += [] if grid.group is None else ["--group", grid.group]
    words += ["--accept-unfair"] if definition.accept_unfair else []
    return shlex.join(words)


def _check_preprocessed(grid: Grid) -> str:
    """Whether the folder that the data were trained from can be read as such; the file ending of label maps."""
    splits = read_or_refuse(
        grid.preprocessed / "splits_final.json", "put back the one that the folds were trained with"
    )
    chosen_splits(splits, grid.folds)
    description = read_or_refuse(grid.preprocessed / "dataset.json", "run nnUNetv2_plan_and_preprocess")
    try:
        return str(description["file_ending"])
    except (KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{grid.preprocessed / 'dataset.json'} is not nnU-Net's ({error!r}); put back the one that was trained with"
        ) from error


def _commands(jobs: Sequence[FoldJob]) -> list[str]:
    """What trained the folds, as recorded."""
    lines: list[str] = []
    for job in jobs:
        record = FoldRecord.read(job.folder)
        if record is None:
            lines.append(f"# {job.name}: trained outside the benchmark")
            continue
        minutes = f"{BUDGET_MINUTES}={record.minutes:g} " if record.minutes is not None else ""
        lines += [minutes + part["command"] for part in record.parts]
    return lines


def _raise_failures(outcomes: Sequence[Outcome], out: Path) -> None:
    told = failures(outcomes)
    if told:
        done = sum(outcome.error is None for outcome in outcomes)
        raise BenchmarkError(
            f"{told}\n\n{len(outcomes) - done} of {len(outcomes)} folds failed, {done} were finished and are kept. "
            f"Mend what is wrong and run the same command again: it goes on from there. No report was written to {out}."
        )
