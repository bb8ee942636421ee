"""One metric of every case, as the aggregates average it."""

from __future__ import annotations

import math

from masksam_nnunet.inference.scoring import CaseScore, ClassScore, Scores, nanmean

from .results import Metric


def case_values(scores: Scores, metric: Metric, class_name: str | None) -> dict[str, float]:
    """The metric by case; NaN where undefined.

    Args:
        scores: of a row.
        metric: which; volume errors without their sign.
        class_name: of one class, or None for the mean over the classes where it is defined.
    """
    return {case.case: case_value(case, metric, class_name) for case in scores.cases}


def case_value(case: CaseScore, metric: Metric, class_name: str | None) -> float:
    """The metric of one case."""
    if class_name is not None:
        return _value(case.classes[class_name], metric)
    return nanmean([_value(score, metric) for score in case.classes.values()])


def case_differences(a: Scores, b: Scores, metric: Metric) -> list[float]:
    """a - b of each case where it is defined, averaged over the classes that both have: as the comparisons take it."""
    theirs = {case.case: case.classes for case in b.cases}
    differences = []
    for case in a.cases:
        others = theirs.get(case.case, {})
        parts = [_value(score, metric) - _value(others[name], metric) for name, score in case.classes.items() if others]
        differences.append(nanmean(parts))
    return [difference for difference in differences if not math.isnan(difference)]


def _value(score: ClassScore, metric: Metric) -> float:
    value: float = getattr(score, metric)
    return abs(value) if metric == "volume_error_ml" else value
