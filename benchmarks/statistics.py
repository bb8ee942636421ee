"""Means with intervals, and paired tests between rows.

Cases of one patient are not independent: whole patients are drawn in the bootstrap, and tested by their means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference import scoring
from masksam_nnunet.plans.splits import group_by_patient

from .case_table import METRICS, case_table, wide
from .errors import listed
from .estimates import RESAMPLES, SEED, Floats, bootstrap_mean, holm, nanmean, patient_means, signed_rank_test
from .results import Aggregate, Comparison, Metric, Row

ALPHA = 0.05
"""Of p, corrected, below which a row counts as better."""
LARGER_IS_BETTER: Mapping[Metric, bool] = {
    "dice": True,
    "hd95_mm": False,
    "surface_dice": True,
    "volume_error_ml": False,
}


def aggregates(
    rows: Sequence[Row], patients: Mapping[str, str] | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[Aggregate, ...]:
    """Mean, median and 95 % interval of every row, metric and class, and of the mean over classes.

    Args:
        rows: of the same cases and classes.
        patients: patient by case; None where the case names are to tell.
        resamples: of the bootstrap.
        seed: the same one gives the same intervals.

    Returns:
        By row, then metric, then class; each metric starts with the mean over classes (``class_name`` None). Volume
        errors are absolute.

    Raises:
        BenchmarkError: rows differ in cases or classes, or share a name.
    """
    table = _Table(rows, patients)
    found = []
    for index, row in enumerate(rows):
        for metric in METRICS:
            for name, values in table.values(metric).items():
                defined = ~np.isnan(values[:, index])
                chosen = values[defined, index]
                mean = bootstrap_mean(chosen, table.patients[defined], resamples, seed)
                median = float(np.median(chosen)) if chosen.size else math.nan
                found.append(Aggregate(row.name, metric, name, mean, median, int(chosen.size)))
    return tuple(found)


def comparisons(
    rows: Sequence[Row],
    pairs: Sequence[tuple[str, str]] | None = None,
    patients: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[Comparison, ...]:
    """Compare pairs of rows in every metric and class, and in the mean over classes.

    Args:
        rows: of the same cases and classes.
        pairs: names (a, b); None for :func:`default_pairs`.
        patients: patient by case; None where the case names are to tell.
        resamples: of the bootstrap.
        seed: the same one gives the same intervals.

    Returns:
        By pair, then metric, then class; each metric starts with the mean over classes (``class_name`` None), which
        takes the classes of a case that are defined in both rows.

    Raises:
        BenchmarkError: rows differ in cases or classes, or share a name; a pair names no row, one row twice, or sets
            a post-processed row against another's raw predictions.
    """
    table = _Table(rows, patients)
    pairs = default_pairs(rows) if pairs is None else pairs
    _check_pairs(rows, pairs)
    order = {row.name: index for index, row in enumerate(rows)}
    return tuple(
        comparison
        for a, b in pairs
        for metric in METRICS
        for comparison in _compare(table, metric, (a, b), (order[a], order[b]), resamples, seed)
    )


def default_pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """All pairs of methods, the later one first, then each ensemble with each of its members."""
    methods = [row for row in rows if row.kind == "method"]
    pairs = [(later.name, earlier.name) for earlier, later in combinations(methods, 2)]
    for row in rows:
        if row.kind == "ensemble":
            pairs += [(row.name, method.name) for method in methods if method.members[0] in row.members]
    return pairs


def policies(
    rows: Sequence[Row], has_ignore_label: bool, patients_of: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What the numbers mean, in words: scores, and what statistics makes of them."""
    table = _Table(rows, patients_of)
    told = "The case names show" if patients_of is None else "By --group there are"
    cases, patients = len(table.cases), len(set(table.patients.tolist()))
    if patients < cases:
        clusters = (
            f"{told} {patients} patients with {cases} cases: the bootstrap draws patients with all their "
            "cases, and the tests take each patient's mean difference."
        )
    else:
        clusters = f"Each of the {cases} cases counts as a patient of its own, since the case names show no others."
    return scoring.policies(rows[0].scores, has_ignore_label) | {
        "averages": (
            "Means and medians are over the cases where a score is defined. The mean over classes is taken within each "
            "case, over the classes where the score is defined; it can differ from nnU-Net's foreground_mean, the mean "
            "over classes of means over cases, where a class is undefined in some cases. Volume errors are averaged "
            "and compared without their sign."
        ),
        "intervals": (
            f"95 % intervals are bootstrap intervals over cases, bias-corrected and accelerated (BCa), {RESAMPLES} "
            f"resamples, seed {SEED}; none is given for fewer than two patients or where all values are equal. They "
            "cover the choice of cases, not that of initial weights and random numbers in training."
        ),
        "patients": clusters,
        "tests": (
            "Rows are compared on the same cases by Wilcoxon's signed-rank test, two-sided. Differences of zero are "
            "dropped; p is exact for up to 50 differences without ties and up to 13 with ties, else from the normal "
            "approximation with correction for ties; p = 1 if all differences are zero."
        ),
        "correction": (
            "p is corrected by Holm over the classes of the same metric and pair of rows, not over metrics or pairs; "
            "the mean over classes stands for itself. A row counts as better at a corrected p below 0.05, in the "
            "direction of the rank-biserial correlation."
        ),
        "effect": (
            "The effect size is the matched-pairs rank-biserial correlation: the rank sum of the cases where the first "
            "row has the larger value minus that of the others, over both; 1 if it is larger in all cases, -1 if in "
            "none."
        ),
        "undefined": (
            "A case where a score is undefined in one of two rows is left out of their comparison, and from the mean "
            "over classes, that class of the case. For HD95 this favours a row that misses structures, for Dice and "
            "surface Dice one that predicts structures which are not there; so it is counted in how many cases only "
            "one of the two has the score."
        ),
    }


class _Table:
    """The scores of rows on their common cases, as arrays."""

    def __init__(self, rows: Sequence[Row], patients: Mapping[str, str] | None) -> None:
        _check_rows(rows)
        self.cases = [case.case for case in rows[0].scores.cases]
        self.classes = list(rows[0].scores.per_class)
        self.patients = _numbered(self.cases, patients)
        """(cases,) number of each case's patient."""
        self._frame = case_table(rows)
        self._values: dict[Metric, Floats] = {}

    def of_classes(self, metric: Metric) -> Floats:
        """(classes, cases, rows); volume errors are absolute."""
        if metric not in self._values:
            parts = [wide(self._frame, metric, name).loc[self.cases].to_numpy(dtype=float) for name in self.classes]
            self._values[metric] = np.stack(parts)
        return self._values[metric]

    def values(self, metric: Metric) -> dict[str | None, Floats]:
        """(cases, rows) of the mean over classes, by None, and of each class by its name."""
        values = self.of_classes(metric)
        return {None: nanmean(values), **dict(zip(self.classes, values, strict=True))}


def _compare(
    table: _Table, metric: Metric, names: tuple[str, str], indices: tuple[int, int], resamples: int, seed: int
) -> list[Comparison]:
    a, b = (table.of_classes(metric)[:, :, index] for index in indices)  # (classes, cases) each
    differences = a - b
    only_a, only_b = ~np.isnan(a) & np.isnan(b), np.isnan(a) & ~np.isnan(b)
    parts: list[tuple[str | None, Floats, Any, Any]] = [
        (None, nanmean(differences), only_a.any(axis=0), only_b.any(axis=0)),
        *zip(table.classes, differences, only_a, only_b, strict=True),
    ]
    tested = []
    for _, difference, _, _ in parts:
        defined = ~np.isnan(difference)
        tested.append(signed_rank_test(patient_means(difference[defined], table.patients[defined])))
    corrected = [tested[0][0], *holm([p for p, _ in tested[1:]])]
    found = []
    for (name, difference, in_a, in_b), (p, effect), p_holm in zip(parts, tested, corrected, strict=True):
        defined = ~np.isnan(difference)
        chosen = difference[defined]
        found.append(
            Comparison(
                metric=metric,
                class_name=name,
                a=names[0],
                b=names[1],
                number=int(chosen.size),
                difference=bootstrap_mean(chosen, table.patients[defined], resamples, seed),
                median_difference=float(np.median(chosen)) if chosen.size else math.nan,
                p=p,
                p_holm=p_holm,
                effect=effect,
                better=_better(metric, names, p_holm, effect),
                only_a=int(in_a.sum()),
                only_b=int(in_b.sum()),
            )
        )
    return found


def _better(metric: Metric, names: tuple[str, str], p: float, effect: float) -> str | None:
    if math.isnan(p) or p >= ALPHA or effect == 0:
        return None
    return names[0] if (effect > 0) == LARGER_IS_BETTER[metric] else names[1]


def _numbered(cases: Sequence[str], patients: Mapping[str, str] | None) -> NDArray[np.intp]:
    """A number for each case, the same for cases of one patient."""
    if patients is None:
        groups = group_by_patient(cases) or {case: [case] for case in cases}
        patients = {case: patient for patient, members in groups.items() for case in members}
    lacking = [case for case in cases if case not in patients]
    if lacking:
        raise BenchmarkError(f"patients lacks the cases {listed(lacking)}; name the patient of every case")
    numbers = {patient: index for index, patient in enumerate(sorted({patients[case] for case in cases}))}
    return np.array([numbers[patients[case]] for case in cases], dtype=np.intp)


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise BenchmarkError("there are no rows to compare: give at least one method with scores")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise BenchmarkError(f"rows share a name: {', '.join(names)}; each needs its own")
    first = rows[0]
    cases = {case.case for case in first.scores.cases}
    for row in rows[1:]:
        others = {case.case for case in row.scores.cases}
        if others != cases:
            raise BenchmarkError(
                f"{first.name!r} and {row.name!r} were scored on different cases: only the first has "
                f"{listed(cases - others)}, only the second {listed(others - cases)}; score the same cases for all"
            )
        if list(row.scores.per_class) != list(first.scores.per_class):
            raise BenchmarkError(
                f"{first.name!r} and {row.name!r} have different classes: {', '.join(first.scores.per_class)} and "
                f"{', '.join(row.scores.per_class)}; compare models of one dataset.json"
            )
        if row.scores.tolerance_mm != first.scores.tolerance_mm:
            raise BenchmarkError(
                f"the surface Dice of {first.name!r} and {row.name!r} have different tolerances: "
                f"{first.scores.tolerance_mm:g} and {row.scores.tolerance_mm:g} mm; score all rows with one"
            )


def _check_pairs(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> None:
    by_name = {row.name: row for row in rows}
    for a, b in pairs:
        for name in (a, b):
            if name not in by_name:
                raise BenchmarkError(f"pairs names {name!r}, which is no row; rows are {', '.join(by_name)}")
        if a == b:
            raise BenchmarkError(f"pairs sets {a!r} against itself; name two rows")
        one, other = by_name[a], by_name[b]
        mixed = (one.kind == "postprocessed") != (other.kind == "postprocessed")
        if mixed and set(one.members) != set(other.members):
            raise BenchmarkError(
                f"pairs sets {a!r} against {b!r}, of which only one is post-processed; compare rows that were treated "
                "alike"
            )
