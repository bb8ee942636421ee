"""The tables of scores and comparisons as text, the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from masksam_nnunet.inference.report.html import UNDEFINED, number
from masksam_nnunet.inference.scoring import nanmean

from .case_values import case_values
from .lookup import KINDS, Lookup
from .metric_styles import STYLES
from .results import BenchmarkResults, Comparison, Metric, Row, TestSetScore

MEAN_OVER_CLASSES = "mean over classes"


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        text: the mean.
        interval: ``[low, high]``, or empty.
        note: the number of cases, where it is not all of them.
        best: whether it is significantly better than the second best of its group.
    """

    text: str
    interval: str
    note: str
    best: bool


@dataclass(frozen=True)
class Group:
    """Rows of one kind: a title, and for each row its name and its cells."""

    title: str
    rows: list[tuple[str, list[Estimate]]]


@dataclass(frozen=True)
class ComparisonLine:
    """One comparison as text.

    Attributes:
        difference: the mean of A - B with its interval.
        better: the name of the better row, or empty.
        better_letter: A, B or a dash.
    """

    difference: str
    median: str
    p: str
    p_holm: str
    effect: str
    number: str
    only_a: str
    only_b: str
    better: str
    better_letter: str


Pairs = list[tuple[tuple[str, str], list[tuple[str, ComparisonLine]]]]
"""For each pair of rows (a, b) its lines, each with what it is about."""


def overall(lookup: Lookup) -> list[Group]:
    """A row for each row of the results, a column for each metric, means over classes."""
    return [
        Group(
            KINDS[kind],
            [(row.name, [_estimate(lookup, rows, row, metric, None) for metric in STYLES]) for row in rows],
        )
        for kind, rows in lookup.groups.items()
    ]


def by_class(lookup: Lookup, metric: Metric) -> list[Group]:
    """A row for each row of the results, a column for the mean over classes and for each class."""
    return [
        Group(
            KINDS[kind],
            [
                (row.name, [_estimate(lookup, rows, row, metric, name) for name in (None, *lookup.classes)])
                for row in rows
            ],
        )
        for kind, rows in lookup.groups.items()
    ]


def transposed(groups: Sequence[Group], heads: Sequence[str]) -> list[tuple[str, list[Estimate]]]:
    """The same cells with ``heads``, the columns' names, as rows."""
    columns = [cells for group in groups for _, cells in group.rows]
    return [(head, [cells[index] for cells in columns]) for index, head in enumerate(heads)]


def compared_overall(results: BenchmarkResults) -> Pairs:
    """A line for each metric, of the mean over classes."""
    return _by_pair([(STYLES[c.metric].heading, c) for c in results.comparisons if c.class_name is None])


def compared_by_class(results: BenchmarkResults, metric: Metric) -> Pairs:
    """A line for each class."""
    return _by_pair([(c.class_name, c) for c in results.comparisons if c.metric == metric and c.class_name is not None])


def test_set_lines(results: BenchmarkResults, classes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A line for each row of the test set: number of cases, mean of each metric, mean Dice of each class."""
    return [(score.name, _test_set_line(score, classes)) for score in results.test_set]


def _estimate(lookup: Lookup, rows: Sequence[Row], row: Row, metric: Metric, class_name: str | None) -> Estimate:
    aggregate = lookup.aggregate(row.name, metric, class_name)
    style = STYLES[metric]
    all_cases = len(row.scores.cases)
    return Estimate(
        style.text()(aggregate.mean.estimate),
        style.interval(aggregate.mean),
        "" if aggregate.number == all_cases else f"n = {aggregate.number}",
        lookup.best(rows, metric, class_name) == row.name,
    )


def _by_pair(named: Sequence[tuple[str, Comparison]]) -> Pairs:
    pairs: dict[tuple[str, str], list[tuple[str, ComparisonLine]]] = {}
    for name, comparison in named:
        pairs.setdefault((comparison.a, comparison.b), []).append((name, _line(comparison)))
    return list(pairs.items())


def _line(comparison: Comparison) -> ComparisonLine:
    style = STYLES[comparison.metric]
    letters = {comparison.a: "A", comparison.b: "B", None: UNDEFINED}
    return ComparisonLine(
        style.with_interval(comparison.difference, signed=True),
        style.text(signed=True)(comparison.median_difference),
        p_value(comparison.p),
        p_value(comparison.p_holm),
        number(2, signed=True)(comparison.effect),
        str(comparison.number),
        str(comparison.only_a),
        str(comparison.only_b),
        comparison.better or "",
        letters[comparison.better],
    )


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    if math.isnan(p):
        return UNDEFINED
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _test_set_line(score: TestSetScore, classes: Sequence[str]) -> list[str]:
    cells = [str(len(score.scores.cases))]
    for metric, style in STYLES.items():
        values = case_values(score.scores, metric, None).values()
        defined = sum(not math.isnan(value) for value in values)
        note = "" if defined == len(values) or not defined else f" (n = {defined})"
        cells.append(style.text()(nanmean(list(values))) + note)
    per_class = [nanmean(list(case_values(score.scores, "dice", name).values())) for name in classes]
    return cells + [STYLES["dice"].text()(value) for value in per_class]
