"""The report's tables as text, the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from masksam_nnunet.inference.report.html import UNDEFINED, number

from .pictures import case_means
from .results import MEAN, METRICS, BenchmarkResults, Kind, MetricStyle
from .statistics import averaged

KINDS: Mapping[Kind, str] = {
    "method": "Methods",
    "ensemble": "Ensembles",
    "postprocessed": "With nnU-Net's post-processing",
}
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: a number or a name.
        notes: smaller texts below it, such as an interval.
        bold: whether it stands out.
    """

    text: str
    notes: tuple[str, ...] = ()
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Lines of cells in groups; the first cell of each line names it.

    Attributes:
        heads: of the columns.
        groups: a title, which may be empty, and lines.
        wordy: numbers of the columns that hold words.
    """

    heads: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    wordy: Sequence[int] = ()


# ---- scores ----------------------------------------------------------------------------------------------------------


def overall(results: BenchmarkResults) -> Table:
    """Means over classes: a line for each row of the results, a column for each metric."""
    cells = _mean_cells(results)
    groups = [
        (title, [[Cell(name), *(cells[name, metric, MEAN] for metric in METRICS)] for name in names])
        for kind, title in KINDS.items()
        if (names := [row.name for row in results.rows if row.kind == kind])
    ]
    return Table(["Mean [95 % CI]", *_headings(METRICS.values())], groups)


def by_class(results: BenchmarkResults, metric: str) -> Table:
    """One metric: a line for the mean over classes and for each class, a column for each row of the results."""
    cells, names = _mean_cells(results), [row.name for row in results.rows]
    lines = [[Cell(one), *(cells[name, metric, one] for name in names)] for one in (MEAN, *results.classes)]
    return Table(["Class", *names], [("", lines)])


def _mean_cells(results: BenchmarkResults) -> dict[tuple[str, str, str], Cell]:
    """A cell for each method, metric and class."""
    all_cases = sum(map(len, results.cases.values()))
    best = {
        (name, str(metric), str(class_name))
        for (_, metric, class_name), group in results.means.groupby(["kind", "metric", "class"])
        if (name := best_of(group, results.comparisons)) is not None
    }
    cells = {}
    for line in results.means.to_dict("records"):
        style, key = METRICS[line["metric"]], (line["method"], line["metric"], line["class"])
        notes = [interval(line["mean"], line["low"], line["high"], style)]
        notes += [f"n = {line['cases']}"] if line["cases"] < all_cases else []
        cells[key] = Cell(number(style.digits)(line["mean"]), tuple(filter(None, notes)), key in best)
    return cells


def best_of(means: pd.DataFrame, comparisons: pd.DataFrame) -> str | None:
    """The method with the best mean, if it is significantly better than the second; None where a mean is undefined.

    Args:
        means: lines of one metric and class.
        comparisons: of all metrics and classes.
    """
    if len(means) < 2 or means["mean"].isna().any():
        return None
    metric, class_name = means["metric"].iloc[0], means["class"].iloc[0]
    ordered = means.sort_values("mean", ascending=not METRICS[metric].larger_is_better, kind="stable")["method"]
    first, second = ordered.iloc[:2]
    same = (comparisons["metric"] == metric) & (comparisons["class"] == class_name)
    pair = comparisons["a"].isin([first, second]) & comparisons["b"].isin([first, second])
    return first if (comparisons.loc[same & pair, "better"] == first).any() else None


def interval(estimate: float, low: float, high: float, style: MetricStyle, signed: bool = False) -> str:
    """``[low, high]``; empty without an estimate, a dash in brackets where there is nothing but the estimate."""
    if math.isnan(estimate):
        return ""
    if math.isnan(low) or math.isnan(high):
        return f"[{UNDEFINED}]"
    text = number(style.digits, signed)
    return f"[{text(low)}, {text(high)}]"


def test_set(results: BenchmarkResults) -> Table:
    """Means over the test cases: of each metric over classes, and the Dice of each class."""
    values = averaged(results.test_set)
    lines = []
    for name, found in values.groupby("method", sort=False):
        line = [Cell(str(name)), Cell(str(found["case"].nunique()))]
        for metric, class_name in [*((m, MEAN) for m in METRICS), *(("dice", one) for one in results.classes)]:
            chosen = found.loc[(found["metric"] == metric) & (found["class"] == class_name), "value"]
            note = () if chosen.notna().all() or chosen.isna().all() else (f"n = {chosen.count()}",)
            line.append(Cell(number(METRICS[metric].digits)(chosen.mean()), note))
        lines.append(line)
    return Table(["", "Cases", *_headings(METRICS.values()), *(f"Dice, {n}" for n in results.classes)], [("", lines)])


def of_case(results: BenchmarkResults, case: str) -> Table:
    """The means over classes of one case, a line for each row of the results."""
    means = {metric: case_means(results, metric) for metric in METRICS}
    lines = [
        [Cell(row.name), *(Cell(number(s.digits)(means[m].loc[case, row.name])) for m, s in METRICS.items())]
        for row in results.rows
    ]
    return Table(["Mean over classes", *_headings(METRICS.values())], [("", lines)])


def _headings(styles: Iterable[MetricStyle]) -> list[str]:
    return [f"{style.heading} {style.arrow}" for style in styles]


# ---- comparisons -----------------------------------------------------------------------------------------------------


def compared_overall(results: BenchmarkResults) -> Table:
    """Comparisons of the mean over classes: a group for each pair, a line for each metric."""
    found = results.comparisons
    return _compared("Metric", found[found["class"] == MEAN], "metric")


def compared_by_class(results: BenchmarkResults, metric: str) -> Table:
    """Comparisons of one metric: a group for each pair, a line for each class."""
    found = results.comparisons
    return _compared("Class", found[(found["metric"] == metric) & (found["class"] != MEAN)], "class")


def _compared(first: str, comparisons: pd.DataFrame, named_by: str) -> Table:
    groups = []
    for (a, b), lines in comparisons.groupby(["a", "b"], sort=False):
        cells = []
        for line in lines.to_dict("records"):
            style = METRICS[line["metric"]]
            signed = number(style.digits, signed=True)
            limits = interval(line["difference"], line["low"], line["high"], style, signed=True)
            better = {a: "A", b: "B"}.get(line["better"], UNDEFINED)
            name = style.heading if named_by == "metric" else line["class"]
            texts = [name, f"{signed(line['difference'])} {limits}".rstrip(), signed(line["median_difference"])]
            texts += [p_value(line["p"]), p_value(line["p_holm"]), number(2, signed=True)(line["effect"])]
            texts += [str(line[key]) for key in ("cases", "only_a", "only_b")]
            cells.append([*map(Cell, texts), Cell(better, bold=better != UNDEFINED)])
        groups.append((f"A: {a}, B: {b}", cells))
    heads = [
        first,
        "Mean A − B [95 % CI]",
        "Median A − B",
        "p",
        "p (Holm)",
        "Effect",
        "n",
        "Only A",
        "Only B",
        "Better",
    ]
    return Table(heads, groups)


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    if math.isnan(p):
        return UNDEFINED
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# ---- trainings -------------------------------------------------------------------------------------------------------


def compute(results: BenchmarkResults) -> Table:
    """What the trainings took: a group for each method with a line for each fold and their total."""
    groups = []
    for name, folds in results.compute.items():
        lines = [
            [Cell(str(fold.fold)), *(Cell(_or_not(getattr(fold, column.field), column.text)) for column in _COLUMNS)]
            for fold in folds
        ]
        totals = (column.total([getattr(fold, column.field) for fold in folds], column.text) for column in _COLUMNS)
        groups.append((name, [*lines, [Cell("all"), *(Cell(total, bold=True) for total in totals)]]))
    wordy = [place for place, column in enumerate(_COLUMNS, 1) if column.text is str]
    return Table(["Fold", *(column.head for column in _COLUMNS)], groups, wordy)


def software(results: BenchmarkResults) -> Table:
    """Devices, versions of packages and commits: a column for each method and one for the evaluation."""
    trained = {
        name: [{"device": fold.device, **fold.versions, "commit": _short(fold.git_hash)} for fold in folds]
        for name, folds in results.compute.items()
    }
    trained["Evaluation"] = [{**results.versions, "commit": _short(results.git_hash)}]
    keys = dict.fromkeys(key for folds in trained.values() for fold in folds for key in fold)
    lines = [
        [Cell(key), *(Cell(_kinds([fold.get(key) for fold in folds]) or UNDEFINED) for folds in trained.values())]
        for key in keys
    ]
    return Table(["", *trained], [("", lines)], wordy=range(1, len(trained) + 1))


def all_hours(results: BenchmarkResults) -> str:
    """Training hours of all methods together."""
    return _sum([fold.seconds for folds in results.compute.values() for fold in folds], hours)


def hours(seconds: float) -> str:
    """Hours, with as many digits as short trainings need."""
    return number(2 if seconds >= 3600 else 3)(seconds / 3600)


def _megabytes(size: float) -> str:
    return number(1)(size / 1e6)


def _or_not(value: Any, text: Callable[[Any], str]) -> str:
    return NOT_RECORDED if value in (None, "") else text(value)


def _sum(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """The sum of what was recorded, with ``(recorded/all)`` where that is not all."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_RECORDED
    return text(math.fsum(known)) + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")


def _most(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    known = [value for value in values if value is not None]
    return f"max. {text(max(known))}" if known else NOT_RECORDED


def _kinds(values: Sequence[Any], text: Callable[[Any], str] = str) -> str:
    return "; ".join(dict.fromkeys(text(value) for value in values if value))


def _nothing(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    return ""


def _short(git_hash: str | None) -> str:
    """The first characters of each commit, with what stands after it."""
    if git_hash is None:
        return NOT_RECORDED
    parts = (commit.partition("+") for commit in git_hash.split(" then "))
    return " then ".join(f"{commit[:8]} {plus}{rest}".rstrip() for commit, plus, rest in parts)


class _Column(NamedTuple):
    """A column of :func:`compute`: a field of :class:`FoldCompute`, its text, and the total of all folds."""

    head: str
    field: str
    text: Callable[[Any], str]
    total: Callable[[Sequence[Any], Callable[[Any], str]], str]


_COLUMNS = (
    _Column("Hours", "seconds", hours, _sum),
    _Column("Hours with breaks", "wall_seconds", hours, _sum),
    _Column("Device", "device", str, _kinds),
    _Column("Peak memory [MiB]", "peak_memory_mib", number(0), _most),
    _Column("Memory of", "peak_memory_of", str, _kinds),
    _Column("Parameters", "parameters", number(0), _nothing),
    _Column("Trainable", "trainable_parameters", number(0), _nothing),
    _Column("Checkpoint [MB]", "checkpoint_bytes", _megabytes, _sum),
    _Column("Iterations", "iterations", number(0), _sum),
    _Column("Epochs", "epochs", number(0), _sum),
    _Column("Resumed", "resumed", number(0), _sum),
)
