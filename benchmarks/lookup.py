"""Find what was computed for a row, a metric and a class; refuse results that do not fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.label_maps import Classes

from .metric_styles import STYLES
from .results import Aggregate, BenchmarkResults, Comparison, Kind, Metric, Row

KINDS: Mapping[Kind, str] = {
    "method": "Methods",
    "ensemble": "Ensembles",
    "postprocessed": "With nnU-Net's post-processing",
}


class Lookup:
    """The results by name.

    Attributes:
        classes: names of the dataset's foreground classes, in nnU-Net's order.
        groups: the rows of each kind that there is, in the order of :data:`KINDS`.
    """

    def __init__(self, results: BenchmarkResults) -> None:
        """Raises:
        BenchmarkError: for results without rows or with names that repeat, lack or are unknown.
        """
        names = [row.name for row in results.rows]
        if not names or len(set(names)) < len(names):
            raise BenchmarkError(
                f"a report needs results of at least one row, each with a name of its own, not of {names}; "
                "evaluate the benchmark anew"
            )
        self.classes = list(Classes.from_dataset_json(results.dataset_json).foreground)
        self.groups: dict[Kind, list[Row]] = {
            kind: found for kind in KINDS if (found := [row for row in results.rows if row.kind == kind])
        }
        self._aggregates = {(a.row, a.metric, a.class_name): a for a in results.aggregates}
        wanted = {(name, metric, one) for name in names for metric in STYLES for one in (None, *self.classes)}
        for name, metric, one in sorted(wanted - self._aggregates.keys(), key=str):
            raise BenchmarkError(
                f"the results have no aggregate of {metric} for row {name!r}, class {one!r}; evaluate the benchmark "
                "anew"
            )
        self._comparisons: dict[tuple[Metric, str | None, frozenset[str]], Comparison] = {}
        for comparison in results.comparisons:
            pair = frozenset((comparison.a, comparison.b))
            if not pair <= set(names):
                raise BenchmarkError(
                    f"the results compare {sorted(pair)}, but have rows {names} only; evaluate the benchmark anew"
                )
            self._comparisons[comparison.metric, comparison.class_name, pair] = comparison

    def aggregate(self, row: str, metric: Metric, class_name: str | None) -> Aggregate:
        """What the tables show."""
        return self._aggregates[row, metric, class_name]

    def comparison(self, one: str, other: str, metric: Metric, class_name: str | None) -> Comparison | None:
        """Of two rows in either order; None if they were not compared."""
        return self._comparisons.get((metric, class_name, frozenset((one, other))))

    def best(self, rows: Sequence[Row], metric: Metric, class_name: str | None) -> str | None:
        """The best of ``rows`` by its mean, if it is significantly better than the second.

        None otherwise, and where a mean is undefined: the others have nothing to beat.
        """
        means = {row.name: self.aggregate(row.name, metric, class_name).mean.estimate for row in rows}
        if len(means) < 2 or any(math.isnan(mean) for mean in means.values()):
            return None
        first, second = sorted(means, key=lambda name: means[name], reverse=STYLES[metric].larger_is_better)[:2]
        comparison = self.comparison(first, second, metric, class_name)
        return first if comparison is not None and comparison.better == first else None


def focus(results: BenchmarkResults) -> Row:
    """The row that the pictures turn on: the first of a MaskSAM, else the first."""
    for row in results.rows:
        if row.kind == "method" and any("masksam" in member.trainer.lower() for member in row.members):
            return row
    return results.rows[0]
