"""The report's tables as text, the same for HTML and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from masksam_nnunet.inference.report.html import UNDEFINED, number

from .results import MEAN, METRICS, BenchmarkResults, Kind
from .statistics import averaged

KINDS: Mapping[Kind, str] = {
    "method": "Methods",
    "ensemble": "Ensembles",
    "postprocessed": "With nnU-Net's post-processing",
}
NOT_RECORDED = "not recorded"
_HEADS = [metric.directed for metric in METRICS.values()]


class Bold(str):
    """A cell that stands out."""

    bold = True


class Table(NamedTuple):
    """Cells of text; the first of each line names it. A cell's lines of text after its first are notes."""

    heads: Sequence[str]  # of the columns
    groups: Mapping[str, Sequence[Sequence[str]]]  # lines of cells by the group's title, which may be empty
    wordy: Sequence[int] = ()  # numbers of the columns that hold words


def estimate(line: Mapping[str, Any], name: str, signed: bool = False) -> str:
    """``0.891`` and below it ``[0.880, 0.902]``: the column ``name`` of a line of statistics, and its interval.

    What is undefined is a dash; a ``signed`` number may show a plus.
    """
    text = number(METRICS[line["metric"]].digits, signed)
    if math.isnan(line[name]):
        return UNDEFINED
    limits = UNDEFINED if math.isnan(line["low"]) else f"{text(line['low'])}, {text(line['high'])}"
    return f"{text(line[name])}\n[{limits}]"


# ---- scores ----------------------------------------------------------------------------------------------------------


def overall(results: BenchmarkResults) -> Table:
    """Means over classes: a line for each row of the results, a column for each metric."""
    cells = _means(results)
    groups = {
        title: [[name, *(cells[name, metric, MEAN] for metric in METRICS)] for name in names]
        for kind, title in KINDS.items()
        if (names := [row.name for row in results.rows if row.kind == kind])
    }
    return Table(["Mean [95 % CI]", *_HEADS], groups)


def by_class(results: BenchmarkResults, metric: str) -> Table:
    """One metric: a line for the mean over classes and for each class, a column for each row of the results."""
    cells, names = _means(results), [row.name for row in results.rows]
    lines = [[one, *(cells[name, metric, one] for name in names)] for one in (MEAN, *results.classes)]
    return Table(["Class", *names], {"": lines})


def _means(results: BenchmarkResults) -> dict[tuple[str, str, str], str]:
    """A cell for each method, metric and class."""
    all_cases = sum(map(len, results.cases.values()))
    cells = {}
    for _, group in results.means.groupby(["kind", "metric", "class"]):
        best = best_of(group, results.comparisons)
        for line in group.to_dict("records"):
            text = estimate(line, "mean") + (f"\nn = {line['cases']}" if line["cases"] < all_cases else "")
            cells[line["method"], line["metric"], line["class"]] = Bold(text) if line["method"] == best else text
    return cells


def best_of(means: pd.DataFrame, comparisons: pd.DataFrame) -> str | None:
    """The method with the best of ``means``, which are of one metric and class, if it is significantly better than the
    second; None where a mean is undefined. Comparisons are of all metrics and classes."""
    if len(means) < 2 or means["mean"].isna().any():
        return None
    metric, class_name = means["metric"].iloc[0], means["class"].iloc[0]
    ordered = means.sort_values("mean", ascending=not METRICS[metric].larger_is_better, kind="stable")["method"]
    first, second = ordered.iloc[:2]
    same = (comparisons["metric"] == metric) & (comparisons["class"] == class_name)
    pair = comparisons["a"].isin([first, second]) & comparisons["b"].isin([first, second])
    return first if (comparisons.loc[same & pair, "better"] == first).any() else None


def test_set(results: BenchmarkResults) -> Table:
    """Means over the test cases: of each metric over classes, and the Dice of each class."""
    columns = [*((metric, MEAN) for metric in METRICS), *(("dice", name) for name in results.classes)]
    lines = []
    for name, found in averaged(results.test_set).groupby("method", sort=False):
        values = found.pivot(index="case", columns=["metric", "class"], values="value")[columns]
        lines.append([str(name), str(len(values))])
        for (metric, _), column in values.items():
            note = f"\nn = {column.count()}" if 0 < column.count() < len(column) else ""
            lines[-1].append(number(METRICS[metric].digits)(column.mean()) + note)
    return Table(["", "Cases", *_HEADS, *(f"Dice, {name}" for name in results.classes)], {"": lines})


def of_case(results: BenchmarkResults, case: str) -> Table:
    """The means over classes of one case, a line for each row of the results."""
    found = averaged(results.scores[results.scores["case"] == case])
    values = found[found["class"] == MEAN].pivot(index="method", columns="metric", values="value")
    lines = [
        [row.name, *(number(metric.digits)(values.loc[row.name, name]) for name, metric in METRICS.items())]
        for row in results.rows
    ]
    return Table(["Mean over classes", *_HEADS], {"": lines})


# ---- comparisons -----------------------------------------------------------------------------------------------------


def compared_overall(results: BenchmarkResults) -> Table:
    """Comparisons of the mean over classes: a group for each pair, a line for each metric."""
    found = results.comparisons[results.comparisons["class"] == MEAN]
    return _compared("Metric", found, [METRICS[metric].heading for metric in found["metric"]])


def compared_by_class(results: BenchmarkResults, metric: str) -> Table:
    """Comparisons of one metric: a group for each pair, a line for each class."""
    found = results.comparisons
    found = found[(found["metric"] == metric) & (found["class"] != MEAN)]
    return _compared("Class", found, found["class"])


def _compared(head: str, comparisons: pd.DataFrame, names: Iterable[str]) -> Table:
    groups: dict[str, list[list[str]]] = {}
    for name, line in zip(names, comparisons.to_dict("records"), strict=True):
        better = {line["a"]: Bold("A"), line["b"]: Bold("B")}.get(line["better"], UNDEFINED)
        cells = [name, estimate(line, "difference", signed=True)]
        cells += [number(METRICS[line["metric"]].digits, signed=True)(line["median_difference"])]
        cells += [p_value(line["p"]), p_value(line["p_holm"]), number(2, signed=True)(line["effect"])]
        cells += [str(line[key]) for key in ("cases", "only_a", "only_b")]
        groups.setdefault(f"A: {line['a']}, B: {line['b']}", []).append([*cells, better])
    heads = ["Mean A − B [95 % CI]", "Median A − B", "p", "p (Holm)", "Effect", "n", "Only A", "Only B", "Better"]
    return Table([head, *heads], groups)


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    return "<0.001" if p < 0.001 else number(3)(p)


# ---- trainings -------------------------------------------------------------------------------------------------------


def hours(seconds: float) -> str:
    """Hours, with as many digits as short trainings need."""
    return number(2 if seconds >= 3600 else 3)(seconds / 3600)


def all_hours(results: BenchmarkResults) -> str:
    """Training hours of all methods together."""
    return _total([fold.seconds for folds in results.compute.values() for fold in folds], hours)


_COMPUTE: Mapping[str, tuple[str, Callable[[Any], str]]] = {  # head: field of FoldCompute, and its text
    "Hours": ("seconds", hours),
    "Hours with breaks": ("wall_seconds", hours),
    "Device": ("device", str),
    "Peak memory [MiB]": ("peak_memory_mib", number(0)),
    "Memory of": ("peak_memory_of", str),
    "Parameters": ("parameters", number(0)),
    "Trainable": ("trainable_parameters", number(0)),
    "Checkpoint [MB]": ("checkpoint_bytes", lambda size: number(1)(size / 1e6)),
    "Iterations": ("iterations", number(0)),
    "Epochs": ("epochs", number(0)),
    "Resumed": ("resumed", number(0)),
}


def compute(results: BenchmarkResults) -> Table:
    """What the trainings took: a group for each method with a line for each fold and their total."""
    groups = {}
    for name, folds in results.compute.items():
        columns = [[str(fold.fold) for fold in folds] + ["all"]]
        for field, text in _COMPUTE.values():
            values = [getattr(fold, field) for fold in folds]
            total = "" if field in ("parameters", "trainable_parameters") else _total(values, text)
            if field == "peak_memory_mib" and total != NOT_RECORDED:
                total = f"max. {text(max(value for value in values if value is not None))}"
            cells = [NOT_RECORDED if value in (None, "") else text(value) for value in values]
            columns.append([*cells, Bold(total)])
        groups[name] = list(zip(*columns, strict=True))
    wordy = [place for place, (_, text) in enumerate(_COMPUTE.values(), 1) if text is str]
    return Table(["Fold", *_COMPUTE], groups, wordy)


def _total(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """The sum of what was recorded, with ``(recorded/all)`` where that is not all; words each once."""
    known = [value for value in values if value not in (None, "")]
    if not known:
        return NOT_RECORDED
    if text is str:
        return _kinds(known)
    return text(math.fsum(known)) + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")


def software(results: BenchmarkResults) -> Table:
    """Devices, versions of packages and commits: a column for each method and one for the evaluation."""
    used = {
        name: [{"device": fold.device, **fold.versions, "commit": _short(fold.git_hash)} for fold in folds]
        for name, folds in results.compute.items()
    }
    used["Evaluation"] = [{**results.versions, "commit": _short(results.git_hash)}]
    keys = dict.fromkeys(key for folds in used.values() for fold in folds for key in fold)
    lines = [[key, *(_kinds(fold.get(key) for fold in folds) for folds in used.values())] for key in keys]
    return Table(["", *used], {"": lines}, wordy=range(1, len(used) + 1))


def _kinds(values: Iterable[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, values))) or UNDEFINED


def _short(git_hash: str | None) -> str:
    """The first characters of each commit, with what stands after it."""
    return NOT_RECORDED if git_hash is None else re.sub(r"([0-9a-f]{8})[0-9a-f]*(?=\+| |$)", r"\1", git_hash)
