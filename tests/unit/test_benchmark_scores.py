"""Distances against other implementations, and the table of all scores."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from masksam_nnunet.benchmarks.case_table import COLUMNS, METRICS, case_table, wide, write_csv
from masksam_nnunet.benchmarks.results import Method, Row
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.scoring import CaseScore, ClassScore, aggregate, score_masks

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8), (2.5, 1.3, 0.45)]


def blobs(seed: int, shape: tuple[int, ...] = (14, 22, 20), share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping blobby masks, which touch the border."""
    rng = np.random.default_rng(seed)
    base, noise = (gaussian_filter(rng.standard_normal(shape), 2.0) for _ in range(2))
    one, other = base, base + 0.4 * noise
    return one > np.quantile(one, 1 - share), other > np.quantile(other, 1 - share)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tolerance", [0.3, 1.0, 2.6])
def test_surface_dice_is_deepminds(spacing: tuple[float, ...], seed: int, tolerance: float) -> None:
    """The same definition: surfaces between voxels, weighted by area. MONAI's sums are float32."""
    library = pytest.importorskip("surface_distance")
    truth, prediction = blobs(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = library.compute_surface_distances(truth, prediction, spacing)
    theirs = library.compute_surface_dice_at_tolerance(distances, tolerance)
    ours = score_masks(truth, prediction, spacing, tolerance).surface_dice
    assert 0.05 < theirs < 1.0 or tolerance > 1
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_hd95_is_its_definition(spacing: tuple[float, ...], seed: int) -> None:
    """Boundary voxels by erosion with six neighbours, all nearest distances in mm, the larger of two percentiles."""
    truth, prediction = blobs(seed)
    points = []
    for mask in (truth, prediction):
        padded = np.pad(mask, 1)
        points.append(np.argwhere(padded & ~binary_erosion(padded)) * np.asarray(spacing))
    one, other = points
    there, back = cKDTree(other).query(one)[0], cKDTree(one).query(other)[0]
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert score_masks(truth, prediction, spacing, 1.0).hd95_mm == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_hausdorff_distance_of_simpleitk_bounds_hd95(spacing: tuple[float, ...]) -> None:
    """SimpleITK knows the maximum only, between whole masks: farther from boundary to boundary, and above HD95."""
    truth, prediction = blobs(1)
    images = []
    for mask in (truth, prediction):
        images.append(sitk.GetImageFromArray(mask.astype(np.uint8)))
        images[-1].SetSpacing(spacing[::-1])
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*images)
    whole = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ours = compute_hausdorff_distance(*whole, True, spacing=list(spacing))
    assert measure.GetHausdorffDistance() <= float(ours) + 1e-5
    assert score_masks(truth, prediction, spacing, 1.0).hd95_mm <= float(ours)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_hd95_of_deepmind_is_weighted_by_area(spacing: tuple[float, ...]) -> None:
    """Another definition, so that the two agree within a voxel's diagonal only."""
    library = pytest.importorskip("surface_distance")
    truth, prediction = blobs(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = library.compute_surface_distances(truth, prediction, spacing)
    theirs = library.compute_robust_hausdorff(distances, 95)
    assert abs(score_masks(truth, prediction, spacing, 1.0).hd95_mm - theirs) <= np.linalg.norm(spacing)


@pytest.mark.parametrize("offset", [(0, 0, 0), (3, 4, 5), (26, 38, 40)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_cropping_changes_nothing(offset: tuple[int, int, int], spacing: tuple[float, ...]) -> None:
    """To the last bit, in the middle of a volume and at both of its corners."""
    truth, prediction = np.zeros((2, 40, 60, 60), dtype=bool)
    window = tuple(slice(o, o + n) for o, n in zip(offset, (14, 22, 20), strict=True))
    truth[window], prediction[window] = blobs(0)
    whole = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            hd95 = float(compute_hausdorff_distance(*whole, True, percentile=95, spacing=list(spacing)))
            dice = float(compute_surface_dice(*whole, [1.0], True, spacing=list(spacing), use_subvoxels=True))
        ours = score_masks(truth, prediction, spacing, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert (ours.hd95_mm, ours.surface_dice) == (hd95, dice)


def test_cropping_in_two_dimensions_changes_nothing() -> None:
    one, other = blobs(4, (40, 36))
    truth, prediction = (np.pad(mask, ((30, 0), (0, 41)))[None] for mask in (one, other))
    apart = score_masks(truth, prediction, (999.0, 1.2, 0.8), 1.0)
    close = score_masks(one[None], other[None], (999.0, 1.2, 0.8), 1.0)
    assert (apart.hd95_mm, apart.surface_dice, apart.dice) == (close.hd95_mm, close.surface_dice, close.dice)


def test_volume_error() -> None:
    score = ClassScore(0.5, 1.0, 0.5, truth_ml=4.0, predicted_ml=3.0)
    assert score.volume_error_ml == -1.0 and score.relative_volume_error == -0.25
    absent = ClassScore(0.0, math.nan, 0.0, truth_ml=0.0, predicted_ml=3.0)
    assert absent.volume_error_ml == 3.0 and math.isnan(absent.relative_volume_error)
    flat = ClassScore(0.5, 1.0, 0.5, math.nan, math.nan)
    assert math.isnan(flat.volume_error_ml) and math.isnan(flat.relative_volume_error)


def row(name: str, values: dict[str, dict[str, tuple[float, float, float]]]) -> Row:
    """A row whose classes have (dice, truth_ml, predicted_ml)."""
    cases = [
        CaseScore(case, {c: ClassScore(dice, 2 * dice, dice / 2, t, p) for c, (dice, t, p) in classes.items()})
        for case, classes in values.items()
    ]
    folds = {case: index % 5 for index, case in enumerate(values)}
    method = Method(name, "nnUNetPlans", "3d_fullres")
    return Row(name, "method", (method,), aggregate(cases, 1.0), folds, (), {}, Path("there"))


ROWS = [
    row("z", {"c1": {"a": (0.5, 4.0, 3.0), "b": (math.nan, 0.0, 0.0)}, "c2": {"a": (0.9, 1.0, 3.0), "b": (0.7, 1, 1)}}),
    row("y", {"c1": {"a": (0.6, 4.0, 4.5), "b": (0.0, 0.0, 1.0)}, "c2": {"a": (0.8, 1.0, 1.0), "b": (0.5, 1, 0)}}),
]


def test_case_table() -> None:
    frame = case_table(ROWS)
    assert list(frame.columns) == list(COLUMNS) and len(frame) == 2 * 2 * 2
    first = frame.iloc[0].to_dict()
    assert first == {
        "row": "z",
        "kind": "method",
        "fold": 0,
        "case": "c1",
        "class": "a",
        "dice": 0.5,
        "hd95_mm": 1.0,
        "surface_dice": 0.25,
        "truth_ml": 4.0,
        "predicted_ml": 3.0,
        "volume_error_ml": -1.0,
    }
    assert set(METRICS) <= set(frame.columns)


def test_wide() -> None:
    frame = case_table(ROWS)
    dice = wide(frame, "dice", "b")
    assert list(dice.columns) == ["z", "y"] and list(dice.index) == ["c1", "c2"]
    assert math.isnan(dice.loc["c1", "z"]) and dice.loc["c2", "y"] == 0.5
    assert wide(frame, "volume_error_ml", "a").loc["c1", "z"] == 1.0  # without its sign


def test_csv_is_whole_and_keeps_every_digit(tmp_path: Path) -> None:
    frame = case_table([row("x", {"c": {"a": (1 / 3, 0.1, 0.2)}})])
    path = tmp_path / "deep" / "scores.csv"
    write_csv(path, frame)
    back = pd.read_csv(path)
    assert back["dice"][0] == 1 / 3
    assert [file.name for file in path.parent.iterdir()] == ["scores.csv"]


def test_a_case_without_fold_is_refused() -> None:
    lost = Row(**(vars(ROWS[0]) | {"fold_of": {"c1": 0}}))
    with pytest.raises(BenchmarkError, match="case 'c2', which no fold"):
        case_table([lost])
