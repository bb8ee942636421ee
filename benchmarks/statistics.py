"""Means with intervals, and paired tests between methods, from the long table of scores.

Cases of one patient are not independent: the bootstrap draws whole patients, and the tests take each patient's mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from masksam_nnunet.plans.splits import group_by_patient

from .results import MEAN, METRICS, Row

RESAMPLES = 9999
SEED = 12345
CONFIDENCE = 0.95
ALPHA = 0.05
"""Bound of the corrected p below which a method counts as better."""
COMPARISON_COLUMNS = (
    *("metric", "class", "a", "b", "cases", "difference", "low", "high", "median_difference"),
    *("p", "p_holm", "effect", "better", "only_a", "only_b"),
)
_BATCH = 1000  # resamples held in memory at a time
_DIGITS = 10  # differences are rounded for ranks: equal ones must be equal in spite of float arithmetic


class Interval(NamedTuple):
    """An estimate with its 95 % interval; NaN where undefined."""

    estimate: float
    low: float
    high: float


# ---- estimates from the values of patients ---------------------------------------------------------------------------


def bootstrap_mean(values: ArrayLike, patients: ArrayLike, resamples: int = RESAMPLES) -> Interval:
    """The mean of ``values`` (N,), without NaN, with its BCa bootstrap interval, drawing whole ``patients`` (N,).

    The interval is NaN with fewer than two patients, or the same mean in all of them.
    """
    by_patient = pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(patients))
    sums, counts = by_patient.sum().to_numpy(), by_patient.size().to_numpy(dtype=float)
    estimate = float(sums.sum() / counts.sum()) if len(counts) else math.nan
    means = sums / counts
    if len(counts) < 2 or np.allclose(means, means[0], rtol=1e-12, atol=1e-12):
        return Interval(estimate, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the interval is NaN then
        interval = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis=-1: np.sum(sums, axis=axis) / np.sum(counts, axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=_BATCH,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    return Interval(estimate, float(interval.low), float(interval.high))


def signed_rank_test(differences: ArrayLike) -> tuple[float, float]:
    """Wilcoxon's signed-rank test of independent paired differences (N,), as scipy chooses between exact and normal.

    Returns:
        The two-sided p and the matched-pairs rank-biserial correlation: the sum of the ranks of positive differences
        minus that of negative ones, over both. Zeros are dropped; 1 and 0 if all are zero, NaN if there are none.
    """
    rounded = np.round(np.asarray(differences, dtype=float), _DIGITS)
    changed = rounded[rounded != 0]
    if not changed.size:
        return (1.0, 0.0) if rounded.size else (math.nan, math.nan)
    ranks = stats.rankdata(np.abs(changed))
    effect = float(np.sum(np.sign(changed) * ranks) / np.sum(ranks))
    return float(stats.wilcoxon(changed).pvalue), effect


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """Holm's correction of the p-values that are not NaN."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)


# ---- tables ----------------------------------------------------------------------------------------------------------


def averaged(scores: pd.DataFrame) -> pd.DataFrame:
    """The values that are averaged and compared: those of :data:`METRICS`, and within each case their :data:`MEAN`.

    Volume errors are absolute: too much in one case must not make up for too little in another. The table has the
    columns of ``scores``, the long table or part of it, and the means over classes first.
    """
    chosen = scores[scores["metric"].isin(METRICS)]
    absolute = chosen["metric"] == "volume_error_ml"
    values = chosen.assign(value=chosen["value"].mask(absolute, chosen["value"].abs()))
    keys = [name for name in scores.columns if name not in ("class", "value")]
    means = values.groupby(keys, sort=False, as_index=False)["value"].mean().assign(**{"class": MEAN})
    return pd.concat([means, values], ignore_index=True)[list(scores.columns)]


def summarise(scores: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean, its 95 % interval and median of every method, metric and class in the long table of scores, and of the mean
    over classes. The same scores give the same intervals.

    Returns:
        Columns ``method, kind, metric, class, mean, low, high, median, cases``; ``cases`` counts those with a value.
    """
    lines = []
    for keys, group in averaged(scores).groupby(["method", "kind", "metric", "class"], sort=False):
        defined = group.dropna(subset="value")
        mean = bootstrap_mean(defined["value"], defined["patient"], resamples)
        lines.append((*keys, *mean, defined["value"].median(), len(defined)))
    columns = ["method", "kind", "metric", "class", "mean", "low", "high", "median", "cases"]
    return pd.DataFrame(lines, columns=columns)


def compare(scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Compare pairs of methods in every metric and class, and in the mean over the classes that both have in a case.

    Args:
        scores: the long table of scores.
        pairs: names (a, b) of methods.
        resamples: of the bootstrap.

    Returns:
        A line for each pair, metric and class, the mean over classes first: ``metric, class, a, b, cases`` (with the
        metric in both), ``difference, low, high`` (mean of a - b and its 95 % interval), ``median_difference, p``
        (Wilcoxon), ``p_holm`` (corrected over the classes of the same metric and pair), ``effect`` (rank-biserial),
        ``better`` (the name of the method that is better at ``p_holm`` < :data:`ALPHA`, else missing), and ``only_a,
        only_b`` (cases left out because only one method has the metric; in the mean over classes, cases in which a
        class is left out).
    """
    tables = [_compare(scores, metric, a, b, resamples) for a, b in pairs for metric in METRICS]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COMPARISON_COLUMNS))


def _compare(scores: pd.DataFrame, metric: str, a: str, b: str, resamples: int) -> pd.DataFrame:
    one, other = (_by_class(scores, metric, name) for name in (a, b))
    in_a, in_b = one.notna() & other.isna(), one.isna() & other.notna()
    in_a[MEAN], in_b[MEAN] = in_a.any(axis=1), in_b.any(axis=1)
    lines = []
    for name, column in differences(scores, metric, a, b).items():
        found = column.dropna()
        mean = bootstrap_mean(found, found.index.get_level_values("patient"), resamples)
        p, effect = signed_rank_test(found.groupby("patient").mean())
        only = in_a[name].sum(), in_b[name].sum()
        lines.append((metric, name, a, b, len(found), *mean, found.median(), p, p, effect, None, *only))
    table = pd.DataFrame(lines, columns=list(COMPARISON_COLUMNS))
    table.loc[1:, "p_holm"] = holm(table["p"][1:])
    a_is_better = (table["effect"] > 0) == METRICS[metric].larger_is_better
    significant = (table["p_holm"] < ALPHA) & (table["effect"] != 0)
    table["better"] = pd.Series(np.where(a_is_better, a, b), dtype="str").where(significant)
    return table


def differences(scores: pd.DataFrame, metric: str, a: str, b: str) -> pd.DataFrame:
    """One metric of ``a`` minus that of ``b``: a line for each (patient, case), a column for their mean and each class.

    The mean, called :data:`MEAN`, is over the classes that both have.
    """
    found = _by_class(scores, metric, a) - _by_class(scores, metric, b)
    found.insert(0, MEAN, found.mean(axis=1))
    return found


def _by_class(scores: pd.DataFrame, metric: str, method: str) -> pd.DataFrame:
    chosen = scores[(scores["metric"] == metric) & (scores["method"] == method)]
    table = chosen.pivot(index=["patient", "case"], columns="class", values="value")[list(chosen["class"].unique())]
    return table.abs() if metric == "volume_error_ml" else table


def default_pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """All pairs of methods, the later one first, then each ensemble with each of its members."""
    methods = [row for row in rows if row.kind == "method"]
    pairs = [(later.name, earlier.name) for earlier, later in combinations(methods, 2)]
    for row in rows:
        if row.kind == "ensemble":
            pairs += [(row.name, method.name) for method in methods if method.members[0] in row.members]
    return pairs


def patient_of(cases: Sequence[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """The patient of each case: as given for all of them, or as the case names show, or each case one of its own."""
    if given is not None:
        return {case: given[case] for case in cases}
    groups = group_by_patient(cases) or {case: [case] for case in cases}
    return {case: patient for patient, members in groups.items() for case in members}


def policies(patients: Mapping[str, str], given: bool) -> dict[str, str]:
    """What the statistics mean, for a report; patients by case, and whether they were given or read from the names."""
    cases, number = len(patients), len(set(patients.values()))
    clusters = f"Each of the {cases} cases counts as a patient of its own, since the case names show no others."
    if number < cases:
        clusters = (
            f"{'By --group there are' if given else 'The case names show'} {number} patients with {cases} cases: the "
            "bootstrap draws patients with all their cases, and the tests take each patient's mean difference."
        )
    return POLICIES | {"patients": clusters}


POLICIES = {
    "averages": (
        "Means and medians are over the cases where a score is defined. The mean over classes is taken within each "
        "case, over its defined classes; nnU-Net's foreground_mean, a mean over classes of means over cases, can "
        "differ where a class is undefined. Volume errors are averaged and compared without their sign."
    ),
    "intervals": (
        f"95 % intervals are bootstrap intervals over cases (BCa, {RESAMPLES} resamples, seed {SEED}); none is given "
        "for fewer than two patients or where all values are equal. They cover the choice of cases, not that of "
        "initial weights and random numbers in training."
    ),
    "tests": (
        "Rows are compared on the same cases by Wilcoxon's signed-rank test, two-sided. Differences of zero are "
        "dropped; p is exact for up to 50 differences without ties and up to 13 with ties, else from the normal "
        "approximation with correction for ties; p = 1 if all differences are zero. p is corrected by Holm over the "
        "classes of the same metric and pair of rows, not over metrics or pairs."
    ),
    "effect": (
        "The effect size is the matched-pairs rank-biserial correlation: 1 if the first row is larger in all cases, "
        "-1 if in none. It gives the direction in which a row counts as better, at a corrected p below 0.05."
    ),
    "undefined": (
        "A case where a score is undefined in one of two rows is left out of their comparison, and from the mean over "
        "classes, that class of the case. For HD95 this favours a row that misses structures, for Dice and surface "
        "Dice one that predicts structures which are not there; so these cases are counted."
    ),
}
