"""Estimates from values of independent patients: intervals, tests, corrections."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from .results import Interval

RESAMPLES = 9999
SEED = 12345
CONFIDENCE = 0.95
_BATCH = 1000  # resamples held in memory at a time
_DIGITS = 10
"""Differences are rounded for ranks: equal ones must be equal in spite of float arithmetic."""

Floats = NDArray[np.float64]


def bootstrap_mean(
    values: Floats, patients: NDArray[np.intp], resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The mean over cases with its bias-corrected and accelerated (BCa) bootstrap interval, patients drawn as a whole.

    The interval is NaN where nothing can be said: fewer than two patients, or the same value in all.

    Args:
        values: (N,) without NaN.
        patients: (N,) number of each case's patient.
        resamples: number of bootstrap samples.
        seed: of the drawing.
    """
    if not values.size:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(values.mean())
    _, member, counts = np.unique(patients, return_inverse=True, return_counts=True)
    sums = np.bincount(member, weights=values)
    means = sums / counts
    if len(counts) < 2 or np.allclose(means, means[0], rtol=1e-12, atol=1e-12):
        return Interval(estimate, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # it gives NaN then, as it should
        interval = stats.bootstrap(
            (sums, counts.astype(float)),
            _ratio,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=_BATCH,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(estimate, float(interval.low), float(interval.high))


def signed_rank_test(differences: Floats) -> tuple[float, float]:
    """Wilcoxon's signed-rank test of independent paired differences (N,).

    Differences of zero are dropped, as Wilcoxon did (``zero_method="wilcox"``). What is left is tested exactly up to
    50 values, by all permutations of signs up to 13 values with ties, else by the normal approximation with correction
    for ties (``method="auto"``).

    Returns:
        The two-sided p and the matched-pairs rank-biserial correlation: the sum of the ranks of positive differences
        minus that of negative ones, over both. 1 and 0 if all differences are zero; NaN if there are none.
    """
    if not differences.size:
        return math.nan, math.nan
    changed = np.round(differences, _DIGITS)
    changed = changed[changed != 0]
    if not changed.size:
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(changed))
    effect = float(np.sum(np.sign(changed) * ranks) / np.sum(ranks))
    return float(stats.wilcoxon(changed, zero_method="wilcox", method="auto").pvalue), effect


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of those that are not NaN."""
    corrected = np.array(p, dtype=float)
    defined = ~np.isnan(corrected)
    if defined.any():
        corrected[defined] = multipletests(corrected[defined], method="holm")[1]
    return [float(value) for value in corrected]


def nanmean(values: Floats) -> Floats:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), math.nan)


def patient_means(values: Floats, patients: NDArray[np.intp]) -> Floats:
    if not values.size:
        return values
    _, member, counts = np.unique(patients, return_inverse=True, return_counts=True)
    means: Floats = np.bincount(member, weights=values) / counts
    return means


def _ratio(sums: Floats, counts: Floats, axis: int = -1) -> Floats:
    total: Floats = np.sum(sums, axis=axis) / np.sum(counts, axis=axis)
    return total
