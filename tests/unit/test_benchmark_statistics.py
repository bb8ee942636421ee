"""Statistics: examples from textbooks and by hand, undefined values, ties, patients, and nnU-Net's own Dice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from masksam_nnunet.benchmarks.estimates import bootstrap_mean, holm, signed_rank_test
from masksam_nnunet.benchmarks.nnunet_scores import check_against_nnunet
from masksam_nnunet.benchmarks.results import Aggregate, Comparison, Kind, Method, Row
from masksam_nnunet.benchmarks.statistics import aggregates, comparisons, default_pairs, policies
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.scoring import CaseScore, ClassScore, aggregate, score_folder

DARWIN = [6.0, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
"""Darwin's maize plants, crossed minus self-fertilised: ranks 10 and 14 of 15 are negative."""
FEW = 499  # resamples, where intervals are not looked at


def row(
    name: str,
    dice: Sequence[Sequence[float]],
    kind: Kind = "method",
    members: Sequence[str] = (),
    hd95: Sequence[Sequence[float]] | None = None,
    volumes: Sequence[Sequence[float]] | None = None,
    cases: Sequence[str] | None = None,
) -> Row:
    """A row from dice[case][class]; classes are called a, b, ...; the truth has 10 ml of each."""
    cases = cases or [f"case_{i:03d}" for i in range(len(dice))]
    hd95 = dice if hd95 is None else hd95
    volumes = [[10.0] * len(d) for d in dice] if volumes is None else volumes
    scored = [
        CaseScore(
            case,
            {
                "abcdefgh"[i]: ClassScore(float(d[i]), float(h[i]), float(d[i]), 10.0, float(v[i]))
                for i in range(len(d))
            },
        )
        for case, d, h, v in zip(cases, dice, hd95, volumes, strict=True)
    ]
    methods = tuple(Method(m, "nnUNetPlans", "3d_fullres") for m in (members or [name]))
    return Row(name, kind, methods, aggregate(scored, 1.0), dict.fromkeys(cases, 0), (), {}, Path("p"))


def column(values: Sequence[float]) -> list[list[float]]:
    return [[value] for value in values]


def one(found: Sequence[Comparison], metric: str, class_name: str | None = None) -> Comparison:
    (chosen,) = [c for c in found if (c.metric, c.class_name) == (metric, class_name)]
    return chosen


def mean_of(found: Sequence[Aggregate], metric: str, class_name: str | None = None) -> Aggregate:
    (chosen,) = [a for a in found if (a.metric, a.class_name) == (metric, class_name)]
    return chosen


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_darwins_plants() -> None:
    p, effect = signed_rank_test(np.array(DARWIN))
    assert p == pytest.approx(0.041259765625)  # exact: 2 * 676 / 2**15
    assert effect == pytest.approx((96 - 24) / 120)


def test_ties_are_tested_by_all_signs() -> None:
    p, effect = signed_rank_test(np.array([1.0] * 5))
    assert p == pytest.approx(2 / 2**5) and effect == 1.0
    p, effect = signed_rank_test(np.array([1.0, 1.0, -1.0]))
    assert p == pytest.approx(1.0) and effect == pytest.approx(1 / 3)


def test_equal_differences_are_ties_in_spite_of_rounding() -> None:
    noisy = np.array([0.1 + 0.2, 0.3, -0.3, 0.7 - 0.4])  # 0.30000000000000004, 0.3, ...
    assert len(set(np.abs(noisy).tolist())) > 1
    assert signed_rank_test(noisy)[1] == pytest.approx((3 * 2.5 - 2.5) / 10)
    assert signed_rank_test(np.array([1e-17, -1e-16, 0.0])) == (1.0, 0.0)


def test_zero_differences_are_dropped() -> None:
    assert signed_rank_test(np.array([*DARWIN, 0.0, 0.0])) == signed_rank_test(np.array(DARWIN))
    assert signed_rank_test(np.zeros(4)) == (1.0, 0.0)


def test_a_test_of_nothing_and_of_one() -> None:
    assert all(math.isnan(value) for value in signed_rank_test(np.array([])))
    assert signed_rank_test(np.array([0.3])) == (1.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_nan = holm([0.01, math.nan, 0.04])
    assert with_nan[0] == pytest.approx(0.02) and math.isnan(with_nan[1]) and with_nan[2] == pytest.approx(0.04)
    assert math.isnan(holm([math.nan])[0]) and holm([]) == []


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_interval_is_near_students_for_normal_values() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = bootstrap_mean(values, np.arange(400))
    half = 1.966 * values.std(ddof=1) / 20
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_hold_the_mean_shrink_and_repeat() -> None:
    widths = []
    for number in (5, 20, 80, 320):
        values = np.random.default_rng(number).beta(8, 2, number)
        found = bootstrap_mean(values, np.arange(number))
        assert found.low < found.estimate < found.high
        assert found == bootstrap_mean(values, np.arange(number))
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)


def test_intervals_cover_the_truth() -> None:
    """In 95 of 100 samples or nearly."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(100):
        found = bootstrap_mean(rng.normal(0.0, 1.0, 30), np.arange(30), resamples=999)
        inside += found.low < 0.0 < found.high
    assert 88 <= inside <= 99


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5]])
def test_no_interval_where_nothing_can_be_said(values: list[float]) -> None:
    found = bootstrap_mean(np.array(values, dtype=float), np.arange(len(values)))
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(found.estimate) if not values else found.estimate == pytest.approx(0.5)


def test_patients_are_drawn_whole() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 25)
    alone = bootstrap_mean(values, np.arange(25))
    doubled = bootstrap_mean(np.repeat(values, 2), np.repeat(np.arange(25), 2))
    assert dataclasses.astuple(doubled) == pytest.approx(dataclasses.astuple(alone))
    wrong = bootstrap_mean(np.repeat(values, 2), np.arange(50))
    assert wrong.high - wrong.low < 0.8 * (doubled.high - doubled.low)
    assert math.isnan(bootstrap_mean(values, np.zeros(25, dtype=int)).low)  # one patient


# ---- aggregates ------------------------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    nan = math.nan
    rows = [row("x", [[0.8, 0.6], [0.4, nan], [0.9, 0.1]], volumes=[[11, 9], [7, 10], [10, 14]])]
    found = aggregates(rows, resamples=FEW)
    assert len(found) == 4 * 3
    dice = mean_of(found, "dice")
    assert dice.mean.estimate == pytest.approx((0.7 + 0.4 + 0.5) / 3) and dice.median == pytest.approx(0.5)
    assert dice.number == 3
    b = mean_of(found, "dice", "b")
    assert (b.number, b.mean.estimate, b.median) == (2, pytest.approx(0.35), pytest.approx(0.35))
    volume = mean_of(found, "volume_error_ml")
    assert volume.mean.estimate == pytest.approx((1 + 1.5 + 2) / 3)  # without signs, or it would be (0 - 1.5 + 2) / 3


def test_undefined_everywhere() -> None:
    rows = [row(name, column([math.nan] * 3), volumes=column([math.nan] * 3)) for name in "xy"]
    for found in aggregates(rows, resamples=FEW):
        assert found.number == 0 and math.isnan(found.mean.estimate) and math.isnan(found.median)
    for compared in comparisons(rows, resamples=FEW):
        assert compared.number == 0 and compared.better is None
        assert all(math.isnan(value) for value in (compared.p, compared.p_holm, compared.effect))


def test_one_case() -> None:
    rows = [row("x", [[0.5, 0.7]]), row("y", [[0.6, 0.6]])]
    for found in aggregates(rows, resamples=FEW):
        assert found.number == 1 and math.isnan(found.mean.low)
    compared = one(comparisons(rows, resamples=FEW), "dice", "a")
    assert compared.p == 1.0 and compared.difference.estimate == pytest.approx(0.1)
    assert compared.better is None and math.isnan(compared.difference.high)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def darwin_rows(**options: object) -> list[Row]:
    base = np.linspace(0.5, 0.6, 15)
    later = base + np.array(DARWIN) / 1000
    return [row("old", column(base), **options), row("new", column(later), **options)]  # type: ignore[arg-type]


def test_comparison_of_darwins_plants() -> None:
    found = comparisons(darwin_rows())
    dice = one(found, "dice", "a")
    assert (dice.a, dice.b, dice.number) == ("new", "old", 15)
    assert dice.p == dice.p_holm == pytest.approx(0.041259765625)
    assert dice.effect == pytest.approx(0.6)
    assert dice.difference.estimate == pytest.approx(np.mean(DARWIN) / 1000)
    assert dice.median_difference == pytest.approx(0.024)
    assert dice.difference.low < dice.difference.estimate < dice.difference.high
    assert dice.better == "new"
    assert one(found, "hd95_mm", "a").better == "old"  # the same numbers, but less is better
    assert one(found, "surface_dice", "a").better == "new"
    assert one(found, "volume_error_ml", "a").p == 1.0 and one(found, "volume_error_ml", "a").better is None


def test_volume_errors_are_compared_without_their_sign() -> None:
    low, high = [[9.0 - i / 10] for i in range(8)], [[11.5 + i / 5] for i in range(8)]
    rows = [row("low", column([0.5] * 8), volumes=low), row("high", column([0.5] * 8), volumes=high)]
    found = one(comparisons(rows, resamples=FEW), "volume_error_ml", "a")
    assert found.a == "high" and found.difference.estimate > 0 and found.better == "low"


def test_holm_over_the_classes_only() -> None:
    """Classes a, b and c differ in 6, 7 and 8 of 8 cases: exact p of 2/64, 2/128 and 2/256."""
    base = np.full((8, 3), 0.5)
    step = np.arange(1, 9)[:, None] / 100 * np.ones((1, 3))
    step[:2, 0] = step[:1, 1] = 0.0
    found = comparisons([row("old", base.tolist()), row("new", (base + step).tolist())], resamples=FEW)
    p = [one(found, "dice", name).p for name in "abc"]
    assert p == pytest.approx([2 / 64, 2 / 128, 2 / 256])
    assert [one(found, "dice", name).p_holm for name in "abc"] == pytest.approx([2 / 64, 4 / 128, 6 / 256])
    mean = one(found, "dice")
    assert mean.p == mean.p_holm == pytest.approx(2 / 256)


def test_undefined_in_one_of_two() -> None:
    nan = math.nan
    a = row("a", [[0.5, 0.5]] * 4, hd95=[[1, 5], [2, nan], [nan, nan], [4, 6]])
    b = row("b", [[0.5, 0.5]] * 4, hd95=[[3, 1], [2, 9], [5, nan], [nan, 7]])
    found = comparisons([a, b], pairs=[("a", "b")], resamples=FEW)
    first, second, mean = (one(found, "hd95_mm", name) for name in ("a", "b", None))
    assert (first.number, first.only_a, first.only_b) == (2, 1, 1)
    assert (second.number, second.only_a, second.only_b) == (2, 0, 1)
    # Case 0: (-2 + 4) / 2; case 1: class a only, 0; case 2: nothing; case 3: class b only, -1.
    assert (mean.number, mean.only_a, mean.only_b) == (3, 1, 2)
    assert mean.difference.estimate == pytest.approx(0.0) and mean.median_difference == pytest.approx(0.0)
    assert first.difference.estimate == pytest.approx(-1.0)


def test_patients_are_tested_by_their_means() -> None:
    names = [f"patient{i:03d}_{frame}" for i in range(15) for frame in ("ED", "ES")]
    base = np.linspace(0.5, 0.6, 30)
    shift = np.repeat(DARWIN, 2) / 1000 + np.tile([0.1, -0.1], 15)
    rows = [row("old", column(base), cases=names), row("new", column(base + shift), cases=names)]
    dice = one(comparisons(rows, resamples=FEW), "dice", "a")
    assert dice.number == 30 and dice.p == pytest.approx(0.041259765625) and dice.effect == pytest.approx(0.6)
    alone = comparisons(rows, patients={name: name for name in names}, resamples=FEW)
    assert one(alone, "dice", "a").p != pytest.approx(dice.p)
    assert "15 patients with 30 cases" in policies(rows, has_ignore_label=False)["patients"]
    with pytest.raises(BenchmarkError, match="patients lacks the cases patient000_ED"):
        comparisons(rows, patients={name: name for name in names[1:]})


def test_pairs() -> None:
    dice = [[0.5], [0.6]]
    rows = [
        row("x", dice),
        row("y", dice),
        row("z", dice),
        row("x + z", dice, "ensemble", ["x", "z"]),
        row("x, post-processed", dice, "postprocessed", ["x"]),
    ]
    assert default_pairs(rows) == [("y", "x"), ("z", "x"), ("z", "y"), ("x + z", "x"), ("x + z", "z")]
    own = comparisons(rows, pairs=[("x, post-processed", "x")], resamples=FEW)
    assert {(c.a, c.b) for c in own} == {("x, post-processed", "x")}
    with pytest.raises(BenchmarkError, match="only one is post-processed"):
        comparisons(rows, pairs=[("x, post-processed", "y")])
    with pytest.raises(BenchmarkError, match="'w', which is no row; rows are x, y"):
        comparisons(rows, pairs=[("x", "w")])
    with pytest.raises(BenchmarkError, match="'x' against itself"):
        comparisons(rows, pairs=[("x", "x")])


def test_rows_that_cannot_be_compared() -> None:
    rows = [row("x", [[0.5], [0.6]])]
    with pytest.raises(BenchmarkError, match="only the first has case_001, only the second case_002"):
        aggregates([*rows, row("y", [[0.5], [0.6]], cases=["case_000", "case_002"])])
    with pytest.raises(BenchmarkError, match="different classes: a and a, b"):
        aggregates([*rows, row("y", [[0.5, 0.5], [0.6, 0.6]])])
    with pytest.raises(BenchmarkError, match="share a name"):
        aggregates([*rows, *rows])
    with pytest.raises(BenchmarkError, match="no rows"):
        aggregates([])
    other = row("y", [[0.5], [0.6]])
    other = dataclasses.replace(other, scores=dataclasses.replace(other.scores, tolerance_mm=2.0))
    with pytest.raises(BenchmarkError, match="different tolerances: 1 and 2 mm"):
        comparisons([*rows, other])


def test_policies_say_it_in_words() -> None:
    texts = policies([row("x", [[0.5], [0.6]])], has_ignore_label=True)
    assert {"dice", "hd95_mm", "surface_dice", "volume_error_ml", "ignore", "tests", "intervals"} <= texts.keys()
    assert "9999 resamples, seed 12345" in texts["intervals"]
    assert "2 cases counts as a patient of its own" in texts["patients"]


# ---- nnU-Net's own numbers -------------------------------------------------------------------------------------------


def nnunet_folder(tmp_path: Path, regions: bool) -> tuple[dict[str, object], list[str]]:
    """Folders ``truth`` and ``prediction``, the latter with nnU-Net's summary.json; class 3 is nowhere."""
    description: dict[str, object] = {
        "labels": {"background": 0, "c": 3, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
        "channel_names": {"0": "MRI"},
    }
    if regions:
        description["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
        description["regions_class_order"] = [1, 2, 3]
    rng = np.random.default_rng(0)
    cases = [f"case{i}" for i in range(3)]
    results = []
    classes = Classes.from_dataset_json(description).foreground.values()
    values = [v if regions and len(v) > 1 else v[0] for v in classes]
    for case in cases:
        labels = np.kron(rng.integers(0, 3, (3, 5, 5)), np.ones((2, 3, 3), dtype=int))
        for folder, array in (("truth", labels), ("prediction", np.where(rng.random(labels.shape) < 0.8, labels, 0))):
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint8)), str(tmp_path / folder / f"{case}.nii.gz"))
        files = [str(tmp_path / folder / f"{case}.nii.gz") for folder in ("truth", "prediction")]
        results.append(compute_metrics(*files, SimpleITKIO(), values))
    means = {v: {"Dice": float(np.nanmean([r["metrics"][v]["Dice"] for r in results]))} for v in values}
    summary = {
        "metric_per_case": results,
        "mean": means,
        "foreground_mean": {"Dice": float(np.mean([m["Dice"] for m in means.values()]))},
    }
    for result in results:
        result["metrics"] = {v: {"Dice": float(m["Dice"])} for v, m in result["metrics"].items()}
    save_summary_json(summary, str(tmp_path / "prediction" / "summary.json"))
    return description, cases


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("regions", [False, True])
def test_dice_is_checked_against_nnunets_summary(tmp_path: Path, regions: bool) -> None:
    description, cases = nnunet_folder(tmp_path, regions)
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", description, cases)
    assert math.isnan(scores.mean_dice)  # class 3 is nowhere: it must not break anything
    summary = tmp_path / "prediction" / "summary.json"
    check_against_nnunet(scores, summary, description)

    content = json.loads(summary.read_text())
    key = next(iter(sorted(content["mean"])))
    name = "whole" if regions else "a"
    content["mean"][key]["Dice"] += 2e-6
    summary.write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match=f"Dice differs from nnU-Net's .*mean of {name}: 0"):
        check_against_nnunet(scores, summary, description)
    content["mean"][key]["Dice"] -= 2e-6
    content["foreground_mean"]["Dice"] = 0.5
    content["metric_per_case"][1]["metrics"][key]["Dice"] = math.nan
    summary.write_text(json.dumps(content))
    with pytest.raises(
        BenchmarkError, match=rf"case1, {name}: .*nan there; foreground mean: nan here, 0\.500000 there"
    ):
        check_against_nnunet(scores, summary, description)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_summary_of_other_cases_or_none(tmp_path: Path) -> None:
    description, cases = nnunet_folder(tmp_path, False)
    summary = tmp_path / "prediction" / "summary.json"
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", description, cases[:2])
    with pytest.raises(BenchmarkError, match="it lacks none and has case2 beside those"):
        check_against_nnunet(scores, summary, description)
    with pytest.raises(BenchmarkError, match=r"nowhere\.json is not there"):
        check_against_nnunet(scores, tmp_path / "nowhere.json", description)
    summary.write_text('{"mean": {')
    with pytest.raises(BenchmarkError, match="not nnU-Net's summary"):
        check_against_nnunet(scores, summary, description)
