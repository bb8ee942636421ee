"""Statistics: examples from textbooks and by hand, undefined values, ties, patients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_benchmark import long_table

from masksam_nnunet.benchmarks.results import MEAN, Kind, ModelName, Row
from masksam_nnunet.benchmarks.statistics import (
    bootstrap_mean,
    compare,
    default_pairs,
    holm,
    patient_of,
    policies,
    signed_rank_test,
    summarise,
)

DARWIN = [6.0, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
"""Darwin's maize plants, crossed minus self-fertilised: ranks 10 and 14 of 15 are negative."""
FEW = 19  # resamples, where intervals are not looked at
Values = Sequence[Sequence[float]]


def scores(
    rows: Mapping[str, Values],
    hd95: Mapping[str, Values] | None = None,
    volume_errors: Mapping[str, Values] | None = None,
    cases: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The long table from dice[method][case][class]; classes are called a, b, ..."""
    values = {}
    for name, dice in rows.items():
        hd95_of, errors = (hd95 or rows)[name], (volume_errors or {}).get(name)
        for index, line in enumerate(dice):
            for place, value in enumerate(line):
                case = cases[index] if cases else f"case_{index:03d}"
                values[name, case, "abcdefgh"[place]] = {
                    "dice": float(value),
                    "hd95_mm": float(hd95_of[index][place]),
                    "surface_dice": float(value),
                    "volume_error_ml": 0.0 if errors is None else float(errors[index][place]),
                }
    return long_table(values)


def column(values: Sequence[float]) -> list[list[float]]:
    return [[value] for value in values]


def one(table: pd.DataFrame, metric: str, class_name: str = MEAN) -> Any:
    (line,) = table[(table["metric"] == metric) & (table["class"] == class_name)].itertuples()
    return line


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "p", "effect"),
    [
        (DARWIN, 2 * 676 / 2**15, (96 - 24) / 120),  # exact
        ([*DARWIN, 0.0, 0.0], 2 * 676 / 2**15, (96 - 24) / 120),  # zeros are dropped
        ([1.0] * 5, 2 / 2**5, 1.0),  # ties: all signs
        ([1.0, 1.0, -1.0], 1.0, 1 / 3),
        ([0.1 + 0.2, 0.3, -0.3, 0.7 - 0.4], None, (3 * 2.5 - 2.5) / 10),  # ties in spite of rounding
        ([1e-17, -1e-16, 0.0], 1.0, 0.0),
        ([0.3], 1.0, 1.0),
        ([], math.nan, math.nan),
    ],
)
def test_signed_ranks(differences: list[float], p: float | None, effect: float) -> None:
    found = signed_rank_test(np.array(differences))
    assert found == pytest.approx((found[0] if p is None else p, effect), nan_ok=True)


def test_holm_by_hand() -> None:
    assert holm(pd.Series([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_nan = holm(pd.Series([0.01, math.nan, 0.04]))
    assert with_nan.tolist() == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)
    assert math.isnan(holm(pd.Series([math.nan]))[0])


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_mean_shrink_and_repeat() -> None:
    widths = []
    for number in (5, 20, 80):
        values = np.random.default_rng(number).beta(8, 2, number)
        found = bootstrap_mean(values, np.arange(number), 999)
        assert found.low < found.estimate < found.high
        assert found == bootstrap_mean(values, np.arange(number), 999)
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)


def test_intervals_cover_the_truth() -> None:
    """In 95 of 100 samples or nearly."""
    rng = np.random.default_rng(7)
    samples = (bootstrap_mean(rng.normal(0.0, 1.0, 30), np.arange(30), resamples=999) for _ in range(100))
    assert 88 <= sum(found.low < 0.0 < found.high for found in samples) <= 99


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5]])
def test_no_interval_where_nothing_can_be_said(values: list[float]) -> None:
    found = bootstrap_mean(np.array(values, dtype=float), np.arange(len(values)))
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(found.estimate) if not values else found.estimate == pytest.approx(0.5)


def test_patients_are_drawn_whole() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 25)
    alone = bootstrap_mean(values, np.arange(25))
    doubled = bootstrap_mean(np.repeat(values, 2), np.repeat(np.arange(25), 2))
    assert doubled == pytest.approx(alone)
    wrong = bootstrap_mean(np.repeat(values, 2), np.arange(50))
    assert wrong.high - wrong.low < 0.8 * (doubled.high - doubled.low)
    assert math.isnan(bootstrap_mean(values, np.zeros(25, dtype=int)).low)  # one patient


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_means_by_hand() -> None:
    nan = math.nan
    found = summarise(
        scores({"x": [[0.8, 0.6], [0.4, nan], [0.9, 0.1]]}, volume_errors={"x": [[1, -1], [-3, 0], [0, 4]]}), FEW
    )
    assert len(found) == 4 * 3
    dice = one(found, "dice")
    assert dice.mean == pytest.approx((0.7 + 0.4 + 0.5) / 3) and dice.median == pytest.approx(0.5)
    assert dice.cases == 3
    b = one(found, "dice", "b")
    assert (b.cases, b.mean, b.median) == (2, pytest.approx(0.35), pytest.approx(0.35))
    volume = one(found, "volume_error_ml")
    assert volume.mean == pytest.approx((1 + 1.5 + 2) / 3)  # without signs, or it would be (0 - 1.5 + 2) / 3


def test_undefined_everywhere() -> None:
    nothing = column([math.nan] * 2)
    table = scores(rows := {"x": nothing, "y": nothing}, volume_errors=rows)
    found = summarise(table, FEW)
    assert (found["cases"] == 0).all() and found[["mean", "median", "low"]].isna().all(axis=None)
    compared = compare(table, [("x", "y")], FEW)
    assert (compared["cases"] == 0).all() and compared["better"].isna().all()
    assert compared[["p", "p_holm", "effect"]].isna().all(axis=None)


def test_comparison_of_darwins_plants() -> None:
    base = np.linspace(0.5, 0.6, 15)
    errors = {"old": column(-1 - base), "new": column(1.5 + base)}  # volumes are compared without their sign
    rows = {"old": column(base), "new": column(base + np.array(DARWIN) / 1000)}
    found = compare(scores(rows, volume_errors=errors), [("new", "old")], 199)
    dice = one(found, "dice", "a")
    assert (dice.a, dice.b, dice.cases) == ("new", "old", 15)
    assert dice.p == dice.p_holm == pytest.approx(0.041259765625)
    assert dice.effect == pytest.approx(0.6)
    assert dice.difference == pytest.approx(np.mean(DARWIN) / 1000)
    assert dice.median_difference == pytest.approx(0.024)
    assert dice.low < dice.difference < dice.high
    assert dice.better == "new"
    assert one(found, "hd95_mm", "a").better == "old"  # the same numbers, but less is better
    volume = one(found, "volume_error_ml", "a")
    assert volume.difference == pytest.approx(0.5) and volume.better == "old"
    alone = scores({"old": [[0.5, 0.7]], "new": [[0.6, 0.6]]})  # one case
    dice = one(compare(alone, [("old", "new")], FEW), "dice", "a")
    assert dice.p == 1.0 and pd.isna(dice.better) and math.isnan(dice.high)


def test_holm_over_the_classes_only() -> None:
    """Classes a, b and c differ in 6, 7 and 8 of 8 cases: exact p of 2/64, 2/128 and 2/256."""
    base = np.full((8, 3), 0.5)
    step = np.arange(1, 9)[:, None] / 100 * np.ones((1, 3))
    step[:2, 0] = step[:1, 1] = 0.0
    found = compare(scores({"old": base.tolist(), "new": (base + step).tolist()}), [("new", "old")], FEW)
    assert [one(found, "dice", name).p for name in "abc"] == pytest.approx([2 / 64, 2 / 128, 2 / 256])
    assert [one(found, "dice", name).p_holm for name in "abc"] == pytest.approx([2 / 64, 4 / 128, 6 / 256])
    mean = one(found, "dice")
    assert mean.p == mean.p_holm == pytest.approx(2 / 256)


def test_undefined_in_one_of_two() -> None:
    nan = math.nan
    same = [[0.5, 0.5]] * 4
    hd95 = {"a": [[1, 5], [2, nan], [nan, nan], [4, 6]], "b": [[3, 1], [2, 9], [5, nan], [nan, 7]]}
    found = compare(scores({"a": same, "b": same}, hd95=hd95), [("a", "b")], FEW)
    first, second, mean = (one(found, "hd95_mm", name) for name in ("a", "b", MEAN))
    assert (first.cases, first.only_a, first.only_b) == (2, 1, 1)
    assert (second.cases, second.only_a, second.only_b) == (2, 0, 1)
    # Case 0: (-2 + 4) / 2; case 1: class a only, 0; case 2: nothing; case 3: class b only, -1.
    assert (mean.cases, mean.only_a, mean.only_b) == (3, 1, 2)
    assert mean.difference == pytest.approx(0.0) and mean.median_difference == pytest.approx(0.0)
    assert first.difference == pytest.approx(-1.0)


def test_patients_are_tested_by_their_means() -> None:
    names = [f"patient{i:03d}_{frame}" for i in range(15) for frame in ("ED", "ES")]
    base = np.linspace(0.5, 0.6, 30)
    shift = np.repeat(DARWIN, 2) / 1000 + np.tile([0.1, -0.1], 15)
    table = scores({"old": column(base), "new": column(base + shift)}, cases=names)
    dice = one(compare(table, [("new", "old")], FEW), "dice", "a")
    assert dice.cases == 30 and dice.p == pytest.approx(0.041259765625) and dice.effect == pytest.approx(0.6)
    alone = compare(table.assign(patient=table["case"]), [("new", "old")], FEW)
    assert one(alone, "dice", "a").p != pytest.approx(dice.p)
    assert "15 patients with 30 cases" in policies(patient_of(names, None), given=False)["patients"]
    assert patient_of(names[:1], dict(zip(names, names, strict=True))) == {names[0]: names[0]}


def test_default_pairs() -> None:
    def row(name: str, kind: Kind, *members: str) -> Row:
        return Row(name, kind, tuple(ModelName(m, "nnUNetPlans", "3d_fullres") for m in members), Path())

    rows = [row(name, "method", name) for name in "xyz"]
    rows += [row("x + z", "ensemble", "x", "z"), row("x, post-processed", "postprocessed", "x")]
    assert default_pairs(rows) == [("y", "x"), ("z", "x"), ("z", "y"), ("x + z", "x"), ("x + z", "z")]
