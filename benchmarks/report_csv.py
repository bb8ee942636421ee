"""Aggregates and comparisons as CSV; NaN is an empty field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .results import BenchmarkResults
from .tables import MEAN_OVER_CLASSES

AGGREGATES = ("row", "kind", "metric", "class", "mean", "mean_low", "mean_high", "median", "cases")
COMPARISONS = (
    *("metric", "class", "a", "b", "cases", "difference", "difference_low", "difference_high", "median_difference"),
    *("p", "p_holm", "effect", "better", "only_a", "only_b"),
)


def aggregates_csv(results: BenchmarkResults) -> str:
    """A line for each row, metric and class; the mean over classes is a class of its own."""
    kinds = {row.name: row.kind for row in results.rows}
    lines = [
        {
            "row": one.row,
            "kind": kinds[one.row],
            "metric": one.metric,
            "class": _class(one.class_name),
            "mean": one.mean.estimate,
            "mean_low": one.mean.low,
            "mean_high": one.mean.high,
            "median": one.median,
            "cases": one.number,
        }
        for one in results.aggregates
    ]
    return _csv(lines, AGGREGATES)


def comparisons_csv(results: BenchmarkResults) -> str:
    """A line for each pair of rows, metric and class; differences are a - b."""
    lines = [
        {
            "metric": one.metric,
            "class": _class(one.class_name),
            "a": one.a,
            "b": one.b,
            "cases": one.number,
            "difference": one.difference.estimate,
            "difference_low": one.difference.low,
            "difference_high": one.difference.high,
            "median_difference": one.median_difference,
            "p": one.p,
            "p_holm": one.p_holm,
            "effect": one.effect,
            "better": one.better,
            "only_a": one.only_a,
            "only_b": one.only_b,
        }
        for one in results.comparisons
    ]
    return _csv(lines, COMPARISONS)


def _class(name: str | None) -> str:
    return f"({MEAN_OVER_CLASSES})" if name is None else name


def _csv(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text: str = pd.DataFrame(lines, columns=list(columns)).to_csv(index=False, lineterminator="\n")
    return text
