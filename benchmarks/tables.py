"""The report's tables as text, the same for HTML and Markdown."""

from __future__ import annotations

import math
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
    """Cells of text; the first of each line names it. A cell's lines of text after its first are notes.

    Attributes:
        heads: of the columns.
        groups: lines of cells by the group's title, which may be empty.
        wordy: numbers of the columns that hold words.
    """

    heads: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[str]]]
    wordy: Sequence[int] = ()


def estimate(line: Mapping[str, Any], name: str, signed: bool = False) -> str:
    """``0.891`` and below it ``[0.880, 0.902]``, with a dash for what is undefined.

    Args:
        line: of a table of statistics, with the columns ``metric, low, high`` and ``name``.
        name: column of the estimate.
        signed: whether to show a plus.
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


def test_set(results: BenchmarkResults) -> Table:
    """Means over the test cases: of each metric over classes, and the Dice of each class."""
    columns = [*((metric, MEAN) for metric in METRICS), *(("dice", name) for name in results.classes)]
    lines = []
    for name, found in averaged(results.test_set).groupby("method", sort=False):
        by_column, all_cases = found.groupby(["metric", "class"])["value"], found["case"].nunique()
        means, counts = by_column.mean(), by_column.count()
        texts = [number(METRICS[key[0]].digits)(means[key]) for key in columns]
        notes = [f"\nn = {counts[key]}" if 0 < counts[key] < all_cases else "" for key in columns]
        lines.append([str(name), str(all_cases), *map("".join, zip(texts, notes, strict=True))])
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
    found = results.comparisons
    return _compared("Metric", found[found["class"] == MEAN])


def compared_by_class(results: BenchmarkResults, metric: str) -> Table:
    """Comparisons of one metric: a group for each pair, a line for each class."""
    found = results.comparisons
    return _compared("Class", found[(found["metric"] == metric) & (found["class"] != MEAN)])


def _compared(first: str, comparisons: pd.DataFrame) -> Table:
    groups: dict[str, list[list[str]]] = {}
    for line in comparisons.to_dict("records"):
        metric = METRICS[line["metric"]]
        better = {line["a"]: Bold("A"), line["b"]: Bold("B")}.get(line["better"], UNDEFINED)
        cells = [metric.heading if first == "Metric" else line["class"], estimate(line, "difference", signed=True)]
        cells += [number(metric.digits, signed=True)(line["median_difference"])]
        cells += [p_value(line["p"]), p_value(line["p_holm"]), number(2, signed=True)(line["effect"])]
        cells += [str(line[key]) for key in ("cases", "only_a", "only_b")]
        groups.setdefault(f"A: {line['a']}, B: {line['b']}", []).append([*cells, better])
    heads = ["Mean A − B [95 % CI]", "Median A − B", "p", "p (Holm)", "Effect", "n", "Only A", "Only B", "Better"]
    return Table([first, *heads], groups)


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    return "<0.001" if p < 0.001 else number(3)(p)


# ---- trainings -------------------------------------------------------------------------------------------------------


def hours(seconds: float) -> str:
    """Hours, with as many digits as short trainings need."""
    return number(2 if seconds >= 3600 else 3)(seconds / 3600)


def all_hours(results: BenchmarkResults) -> str:
    """Training hours of all methods together."""
    return _total([fold.seconds for folds in results.compute.values() for fold in folds], hours, "sum")


_COMPUTE: Mapping[str, tuple[str, Callable[[Any], str], str]] = {  # head: field of FoldCompute, its text, the total
    "Hours": ("seconds", hours, "sum"),
    "Hours with breaks": ("wall_seconds", hours, "sum"),
    "Device": ("device", str, "kinds"),
    "Peak memory [MiB]": ("peak_memory_mib", number(0), "max."),
    "Memory of": ("peak_memory_of", str, "kinds"),
    "Parameters": ("parameters", number(0), "none"),
    "Trainable": ("trainable_parameters", number(0), "none"),
    "Checkpoint [MB]": ("checkpoint_bytes", lambda size: number(1)(size / 1e6), "sum"),
    "Iterations": ("iterations", number(0), "sum"),
    "Epochs": ("epochs", number(0), "sum"),
    "Resumed": ("resumed", number(0), "sum"),
}


def compute(results: BenchmarkResults) -> Table:
    """What the trainings took: a group for each method with a line for each fold and their total."""
    groups = {}
    for name, folds in results.compute.items():
        columns = [[str(fold.fold) for fold in folds] + ["all"]]
        for field, text, how in _COMPUTE.values():
            values = [getattr(fold, field) for fold in folds]
            cells = [NOT_RECORDED if value in (None, "") else text(value) for value in values]
            columns.append([*cells, Bold(_total(values, text, how))])
        groups[name] = list(zip(*columns, strict=True))
    wordy = [place for place, (_, text, _) in enumerate(_COMPUTE.values(), 1) if text is str]
    return Table(["Fold", *_COMPUTE], groups, wordy)


def _total(values: Sequence[Any], text: Callable[[Any], str], how: str) -> str:
    """The total of what was recorded; sums show ``(recorded/all)`` where that is not all."""
    known = [value for value in values if value not in (None, "")]
    if how == "none":
        return ""
    if not known:
        return NOT_RECORDED
    if how == "kinds":
        return _kinds(map(text, known))
    if how == "max.":
        return f"max. {text(max(known))}"
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
    if git_hash is None:
        return NOT_RECORDED
    parts = (commit.partition("+") for commit in git_hash.split(" then "))
    return " then ".join(f"{commit[:8]} {plus}{rest}".rstrip() for commit, plus, rest in parts)
