"""What the trainings took, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from masksam_nnunet.inference.report.html import number

from .results import BenchmarkResults, FoldCompute

NOT_RECORDED = "not recorded"
HEADS = (
    "Fold",
    "Hours",
    "Hours with breaks",
    "Device",
    "Peak memory [MiB]",
    "Memory of",
    "Parameters",
    "Trainable",
    "Checkpoint [MB]",
    "Iterations",
    "Epochs",
    "Resumed",
    "Commit",
)


@dataclass(frozen=True)
class ComputeGroup:
    """One row of the results: a line for each fold, and the totals; all of :data:`HEADS`' length."""

    title: str
    lines: list[list[str]]
    total: list[str]


def compute_groups(results: BenchmarkResults) -> list[ComputeGroup]:
    """Methods with every fold; ensembles with the total of their members only. Post-processing trains nothing."""
    groups = []
    for row in results.rows:
        if row.kind == "method":
            groups.append(ComputeGroup(row.name, [_line(fold) for fold in row.compute], _total(row.compute)))
        elif row.kind == "ensemble":
            groups.append(ComputeGroup(f"{row.name} (its members together)", [], _total(row.compute)))
    return groups


def all_hours(results: BenchmarkResults) -> str:
    """Training hours of all methods together."""
    return _sum([f.seconds for row in results.rows if row.kind == "method" for f in row.compute], hours)


def hours(seconds: float) -> str:
    """Hours, with as many digits as short trainings need."""
    return number(2 if seconds >= 3600 else 3)(seconds / 3600)


def _line(fold: FoldCompute) -> list[str]:
    count = number(0)
    return [
        str(fold.fold),
        _or_not(fold.seconds, hours),
        _or_not(fold.wall_seconds, hours),
        fold.device,
        _or_not(fold.peak_memory_mib, count),
        fold.peak_memory_of or NOT_RECORDED,
        _or_not(fold.parameters, count),
        _or_not(fold.trainable_parameters, count),
        _megabytes(fold.checkpoint_bytes),
        _or_not(fold.iterations, count),
        _or_not(fold.epochs, count),
        str(fold.resumed),
        NOT_RECORDED if fold.git_hash is None else _short(fold.git_hash),
    ]


def _total(folds: Sequence[FoldCompute]) -> list[str]:
    memory = [fold.peak_memory_mib for fold in folds if fold.peak_memory_mib is not None]
    return [
        "all",
        _sum([fold.seconds for fold in folds], hours),
        _sum([fold.wall_seconds for fold in folds], hours),
        ", ".join(sorted({fold.device for fold in folds})),
        f"max. {number(0)(max(memory))}" if memory else NOT_RECORDED,
        ", ".join(sorted({fold.peak_memory_of for fold in folds if fold.peak_memory_of})),
        "",
        "",
        _megabytes(sum(fold.checkpoint_bytes for fold in folds)),
        _sum([fold.iterations for fold in folds], number(0)),
        _sum([fold.epochs for fold in folds], number(0)),
        str(sum(fold.resumed for fold in folds)),
        "",
    ]


def _sum(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """The sum of what was recorded, with ``(recorded/all)`` where that is not all."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_RECORDED
    return text(math.fsum(known)) + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")


def _or_not(value: float | None, text: Callable[[float], str]) -> str:
    return NOT_RECORDED if value is None else text(value)


def _megabytes(size: int) -> str:
    return number(1)(size / 1e6)


def _short(git_hash: str) -> str:
    """The first characters of each commit, and what is said after it."""
    parts = (commit.partition("+") for commit in git_hash.split(" then "))
    return " then ".join(f"{commit[:8]} {plus}{rest}".rstrip() for commit, plus, rest in parts)
