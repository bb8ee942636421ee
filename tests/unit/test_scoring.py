"""Scores: boxes by hand, other implementations of the distances, empty classes, damaged files, nnU-Net's numbers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from scipy.ndimage import gaussian_filter

from masksam_nnunet.errors import DataError
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.inference.scoring import default_tolerance_mm, policies, read_pair, score_folder, score_masks

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8)]
SPACING = (3.0, 1.0, 1.0)
LABELS = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}


def box(start: tuple[int, int, int], size: tuple[int, int, int] = (4, 10, 10)) -> np.ndarray:
    mask = np.zeros((12, 24, 24), dtype=bool)
    mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = True
    return mask


def write(folder: Path, case: str, labels: np.ndarray, spacing=SPACING, origin=(5.0, -7.0, 11.0)) -> None:
    folder.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(folder / f"{case}.nii.gz"))


def scored(folder: Path, description: Any = LABELS, names: Sequence[str] = ("x",)) -> pd.DataFrame:
    return score_folder(folder / "prediction", folder / "truth", description, names, 1.0)


def value(scores: pd.DataFrame, metric: str) -> float:
    """Of the first class of the first case."""
    return float(scores.loc[scores["metric"] == metric, "value"].iloc[0])


def test_shift_by_one_slice_is_three_millimetres() -> None:
    score = score_masks(box((3, 5, 5)), box((4, 5, 5)), SPACING, 0.5)
    assert score["dice"] == pytest.approx(2 * 300 / 800)
    # Of 272 boundary voxels, 100 are the top slice, one slice away; the 64 inside the bottom slice are up to 3 mm away.
    assert score["hd95_mm"] == pytest.approx(3.0)
    # Surfaces pass half-way between voxel centres. Bevelled edges: two half-voxel legs, three at a corner.
    across, upright = math.hypot(1.5, 0.5), 3 * math.hypot(0.5, 0.5)
    corner = 0.5 * np.linalg.norm(np.cross([-1.5, 0.5, 0], [-1.5, 0, 0.5]))
    lid, rim, level = 81.0, 4 * 9 * across + 4 * corner, 4 * 9 * 3 + 4 * upright
    total = 2 * (lid + rim) + 3 * level
    # Off the other surface: the lid beyond it with its rim, and the inside of the lid within it.
    assert score["surface_dice"] == pytest.approx(1 - (2 * lid + rim) / total, abs=1e-4)
    assert score_masks(box((3, 5, 5)), box((4, 5, 5)), SPACING, 3.0)["surface_dice"] == 1.0


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping blobby masks, which touch the border."""
    rng = np.random.default_rng(0)
    base, noise = (gaussian_filter(rng.standard_normal((14, 22, 20)), 2.0) for _ in range(2))
    one, other = base, base + 0.4 * noise
    return one > np.quantile(one, 0.7), other > np.quantile(other, 0.7)


@pytest.mark.parametrize(("spacing", "tolerance"), [(SPACINGS[0], 0.3), (SPACINGS[1], 2.6)])
def test_surface_dice_is_deepminds(spacing: tuple[float, ...], tolerance: float) -> None:
    """The same definition: surfaces between voxels, weighted by area. MONAI's sums are float32."""
    library = pytest.importorskip("surface_distance")
    truth, prediction = blobs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = library.compute_surface_distances(truth, prediction, spacing)
    theirs = library.compute_surface_dice_at_tolerance(distances, tolerance)
    assert score_masks(truth, prediction, spacing, tolerance)["surface_dice"] == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("offset", [(3, 4, 5), (26, 38, 40)])
def test_cropping_changes_nothing(offset: tuple[int, int, int]) -> None:
    """To the last bit, in the middle of a volume and in its corner."""
    truth, prediction = np.zeros((2, 40, 60, 60), dtype=bool)
    spacing = SPACINGS[1]
    window = tuple(slice(o, o + n) for o, n in zip(offset, (14, 22, 20), strict=True))
    truth[window], prediction[window] = blobs()
    whole = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = float(compute_hausdorff_distance(*whole, True, percentile=95, spacing=list(spacing)))
        dice = float(compute_surface_dice(*whole, [1.0], True, spacing=list(spacing), use_subvoxels=True))
    score = score_masks(truth, prediction, spacing, 1.0)
    assert (score["hd95_mm"], score["surface_dice"]) == (hd95, dice)


@pytest.mark.parametrize(
    ("truth", "prediction", "dice", "surface_dice"),
    [(False, False, math.nan, math.nan), (True, False, 0.0, 0.0), (False, True, 0.0, 0.0)],
)
def test_empty_classes(truth: bool, prediction: bool, dice: float, surface_dice: float) -> None:
    full, empty = box((3, 5, 5)), np.zeros((12, 24, 24), dtype=bool)
    score = score_masks(full if truth else empty, full if prediction else empty, SPACING, 1.0)
    assert np.array_equal([score["dice"], score["surface_dice"]], [dice, surface_dice], equal_nan=True)
    assert math.isnan(score["hd95_mm"])
    assert score["truth_ml"] == (1.2 if truth else 0.0)


def test_one_slice_is_scored_in_its_plane() -> None:
    truth, prediction = np.zeros((2, 1, 24, 24), dtype=bool)
    truth[0, 5:15, 5:15] = prediction[0, 5:15, 7:17] = True
    score = score_masks(truth, prediction, (999.0, 1.0, 0.5), 1.0)
    assert score["dice"] == pytest.approx(0.8)
    assert score["hd95_mm"] == pytest.approx(1.0)
    assert score["surface_dice"] == 1.0
    assert math.isnan(score["truth_ml"])


def random_case(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.integers(0, 4, (3, 5, 5))
    return np.kron(coarse, np.ones((3, 4, 4), dtype=int))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_dice_is_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regions: bool) -> None:
    """With a class that is in neither or only in one of truth and prediction."""
    description = dict(LABELS)
    if regions:
        description["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
        description["regions_class_order"] = [1, 2, 3]
    rng = np.random.default_rng(1)
    names = [f"case{index}" for index in range(3)]
    for index, name in enumerate(names):
        truth = random_case(rng)
        prediction = np.where(rng.random(truth.shape) < 0.8, truth, 0)
        if index < 2:  # a class in neither, a class in one of them
            truth[truth == 3] = 0
        if index == 0:
            prediction[prediction == 3] = 0
        write(tmp_path / "truth", name, truth)
        write(tmp_path / "prediction", name, prediction)
    values = [v if regions and len(v) > 1 else v[0] for v in Classes.from_dataset_json(description).foreground.values()]
    summary = tmp_path / "prediction" / "summary.json"
    folders = str(tmp_path / "truth"), str(tmp_path / "prediction")
    monkeypatch.setattr("multiprocessing.get_context", lambda _: SimpleNamespace(Pool=ThreadPool))
    compute_metrics_on_folder(*folders, str(summary), SimpleITKIO(), ".nii.gz", values, num_processes=1)
    scores = scored(tmp_path, description, names)
    assert len(scores) == 3 * 3 * 6
    dice = scores[scores["metric"] == "dice"].pivot(index="case", columns="class", values="value")
    theirs = {
        Path(one["prediction_file"]).name.removesuffix(".nii.gz"): [found["Dice"] for found in one["metrics"].values()]
        for one in load_summary_json(str(summary))["metric_per_case"]
    }
    for name in names:  # metrics are in the order of the values
        ours = dice.loc[name, list(Classes.from_dataset_json(description).foreground)]
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=1e-6)
    assert dice.isna().any(axis=None)


def test_ignored_voxels_do_not_count_and_rounded_labels_are_labels(tmp_path: Path) -> None:
    description = LABELS | {"labels": {"background": 0, "a": 1, "ignore": 2}}
    truth = box((3, 5, 5)).astype(int)
    truth[:, 15:] = 2
    write(tmp_path / "truth", "x", truth)
    write(tmp_path / "prediction", "x", box((3, 5, 5), (4, 19, 10)))
    file = str(tmp_path / "prediction" / "x.nii.gz")
    sitk.WriteImage(sitk.ReadImage(file, sitk.sitkFloat32) * 0.9999, file)  # as a header's scaling leaves it
    scores = scored(tmp_path, description)
    assert list(scores["class"].unique()) == ["a"]
    assert value(scores, "dice") == 1.0 and value(scores, "hd95_mm") == 0.0
    assert "ignore" in policies(1.0, has_ignore_label=True) and "ignore" not in policies(1.0, has_ignore_label=False)


def test_default_tolerance(tmp_path: Path) -> None:
    write(tmp_path, "fine", box((3, 5, 5)), spacing=(3.0, 0.7, 0.7))
    write(tmp_path, "coarse", box((3, 5, 5)), spacing=(5.0, 1.5, 1.4))
    write(tmp_path, "sagittal", box((3, 5, 5)), spacing=(0.9, 0.9, 4.9))
    fine, coarse, sagittal = (read_label_map(tmp_path, name, LABELS) for name in ("fine", "coarse", "sagittal"))
    assert default_tolerance_mm([sagittal]) == 1.0
    assert default_tolerance_mm([fine]) == 1.0
    assert default_tolerance_mm([fine, coarse]) == pytest.approx(1.5)
    assert "1.5 mm" in policies(1.5, has_ignore_label=False)["surface_dice"]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("shape", {"labels": np.zeros((12, 24, 23))}),
        ("spacing", {"spacing": (3.0, 1.0, 1.1)}),
        ("origin", {"origin": (5.0, -7.0, 12.0)}),
    ],
)
def test_other_geometry_is_an_error(tmp_path: Path, message: str, change: dict[str, Any]) -> None:
    write(tmp_path / "truth", "x", box((3, 5, 5)))
    write(tmp_path / "prediction", "x", **{"labels": box((3, 5, 5)), **change})
    with pytest.raises(DataError, match=rf"'x': {message}"):
        scored(tmp_path)


def test_classes_follow_nnunets_order() -> None:
    classes = Classes.from_dataset_json({"labels": {"background": 0, "second": 2, "first": 1}})
    assert classes.heads == ["background", "first", "second"]
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    classes = Classes.from_dataset_json(json.loads(json.dumps(regions)))
    assert classes.heads == ["whole", "core"] and classes.ignore_label == 3
    assert classes.foreground == {"whole": (1, 2), "core": (2,)}


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    for name, size in (("b", 3), ("a", 5)):  # no class in both, which would need MONAI in each process
        write(tmp_path / "truth", name, box((3, 5, 5), (size, 10, 10)))
        write(tmp_path / "prediction", name, box((3, 5, 5), (size, 10, 9)) * 2)
    folders = tmp_path / "prediction", tmp_path / "truth"
    alone, together = (score_folder(*folders, LABELS, ["b", "a"], 1.0, processes=n) for n in (1, 2))
    assert list(together["case"].unique()) == ["a", "b"]
    pd.testing.assert_frame_equal(alone, together, check_exact=True)


def cut(file: Path) -> None:
    """ITK would read the half of a file and fill the rest with noise."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """The checksum no longer fits."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-6] + bytes([whole[-6] ^ 0xFF]) + whole[-5:])


def put(value: float) -> Callable[[Path], None]:
    def one_voxel(file: Path) -> None:
        image = sitk.ReadImage(str(file), sitk.sitkFloat32)
        image[4, 4, 4] = value
        sitk.WriteImage(image, str(file))

    return one_voxel


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (Path.unlink, "x.nii.gz"),
        (lambda file: file.write_bytes(b""), "x.nii.gz"),
        (cut, "x.nii.gz"),
        (flip, "x.nii.gz"),
        (put(math.nan), "x.nii.gz .* nan"),
        (put(0.5), "x.nii.gz .* 0.5"),
        (put(7), "x.nii.gz .* 7, .* 0, 1, 2, 3"),
    ],
)
@pytest.mark.parametrize("folder", ["truth", "prediction"])
def test_bad_files_are_named(tmp_path: Path, folder: str, spoil: Callable[[Path], object], named: str) -> None:
    for each in ("truth", "prediction"):
        write(tmp_path / each, "x", box((3, 5, 5)))
    spoil(tmp_path / folder / "x.nii.gz")
    with pytest.raises(DataError, match=f"'x'.*{folder}/{named}"):
        scored(tmp_path)


def test_a_prediction_without_the_spacing_of_its_tiff_lies_where_its_truth_does(tmp_path: Path) -> None:
    """nnU-Net combines folds by copying label maps, without the .json beside a TIFF."""
    description = {"labels": {"background": 0, "a": 1}, "file_ending": ".tif", "channel_names": {"0": "MR"}}
    for part in ("truth", "predicted"):
        (tmp_path / part).mkdir()
        Tiff3DIO().write_seg(np.ones((6, 5, 7), np.uint8), str(tmp_path / part / "a.tif"), {"spacing": [4.0, 0.5, 0.5]})
    (tmp_path / "predicted" / "a.json").unlink()
    truth, _ = read_pair(tmp_path / "predicted", tmp_path / "predicted", description, "a")
    assert truth.grid.spacing == (1.0, 1.0, 1.0)
    truth, prediction = read_pair(tmp_path / "predicted", tmp_path / "truth", description, "a")
    assert truth.grid.spacing == prediction.grid.spacing == (4.0, 0.5, 0.5)
