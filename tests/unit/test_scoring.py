"""Scores: hand-computed boxes with anisotropic voxels, empty classes, geometry, and nnU-Net's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from masksam_nnunet.inference.label_maps import Classes, LabelMapError
from masksam_nnunet.inference.scoring import (
    check_cases,
    default_tolerance_mm,
    nanmean,
    policies,
    score_folder,
    score_masks,
)

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


def test_perfect() -> None:
    score = score_masks(box((3, 5, 5)), box((3, 5, 5)), SPACING, 1.0)
    assert (score.dice, score.hd95_mm, score.surface_dice) == (1.0, 0.0, 1.0)
    assert score.truth_ml == score.predicted_ml == pytest.approx(4 * 10 * 10 * 3 / 1000)


def test_shift_by_one_slice_is_three_millimetres() -> None:
    score = score_masks(box((3, 5, 5)), box((4, 5, 5)), SPACING, 0.5)
    assert score.dice == pytest.approx(2 * 300 / 800)
    # Of 272 boundary voxels, 100 are the top slice, one slice away; the 64 inside the bottom slice are up to 3 mm away.
    assert score.hd95_mm == pytest.approx(3.0)
    # Surfaces pass half-way between voxel centres. Bevelled edges: two half-voxel legs, three at a corner.
    across, upright = math.hypot(1.5, 0.5), 3 * math.hypot(0.5, 0.5)
    corner = 0.5 * np.linalg.norm(np.cross([-1.5, 0.5, 0], [-1.5, 0, 0.5]))
    lid, rim, level = 81.0, 4 * 9 * across + 4 * corner, 4 * 9 * 3 + 4 * upright
    total = 2 * (lid + rim) + 3 * level
    # Off the other surface: the lid beyond it with its rim, and the inside of the lid within it.
    assert score.surface_dice == pytest.approx(1 - (2 * lid + rim) / total, abs=1e-4)
    assert score_masks(box((3, 5, 5)), box((4, 5, 5)), SPACING, 3.0).surface_dice == 1.0


def test_shift_in_plane_is_measured_in_its_own_spacing() -> None:
    for spacing, expected in (((3.0, 1.0, 1.0), 2.0), ((3.0, 1.5, 1.0), 3.0)):
        score = score_masks(box((3, 5, 5)), box((3, 7, 5)), spacing, 1.0)
        assert score.hd95_mm == pytest.approx(expected)
        assert score.dice == pytest.approx(2 * 320 / 800)


def test_hd95_ignores_one_stray_voxel_but_not_many() -> None:
    stray = box((3, 5, 5))
    stray[10, 20, 20] = True
    assert score_masks(box((3, 5, 5)), stray, SPACING, 1.0).hd95_mm == 0.0
    stray[8:12, 18:24, 18:24] = True
    assert score_masks(box((3, 5, 5)), stray, SPACING, 1.0).hd95_mm > 10


def test_structures_that_touch_the_border() -> None:
    truth, prediction = box((0, 0, 0)), box((1, 0, 0))
    moved = score_masks(box((3, 5, 5)), box((4, 5, 5)), SPACING, 0.5)
    assert score_masks(truth, prediction, SPACING, 0.5) == moved


@pytest.mark.parametrize(
    ("truth", "prediction", "dice", "surface_dice"),
    [(False, False, math.nan, math.nan), (True, False, 0.0, 0.0), (False, True, 0.0, 0.0)],
)
def test_empty_classes(truth: bool, prediction: bool, dice: float, surface_dice: float) -> None:
    full, empty = box((3, 5, 5)), np.zeros((12, 24, 24), dtype=bool)
    score = score_masks(full if truth else empty, full if prediction else empty, SPACING, 1.0)
    assert np.array_equal([score.dice, score.surface_dice], [dice, surface_dice], equal_nan=True)
    assert math.isnan(score.hd95_mm)
    assert score.truth_ml == (1.2 if truth else 0.0)


def test_one_slice_is_scored_in_its_plane() -> None:
    truth, prediction = np.zeros((2, 1, 24, 24), dtype=bool)
    truth[0, 5:15, 5:15] = prediction[0, 5:15, 7:17] = True
    score = score_masks(truth, prediction, (999.0, 1.0, 0.5), 1.0)
    assert score.dice == pytest.approx(0.8)
    assert score.hd95_mm == pytest.approx(1.0)
    assert score.surface_dice == 1.0
    assert math.isnan(score.truth_ml)


def random_case(rng: np.random.Generator, classes: int = 4) -> np.ndarray:
    coarse = rng.integers(0, classes, (3, 5, 5))
    return np.kron(coarse, np.ones((3, 4, 4), dtype=int))


@pytest.mark.parametrize("regions", [False, True])
def test_dice_is_nnunets(tmp_path: Path, regions: bool) -> None:
    description = dict(LABELS)
    if regions:
        description["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
        description["regions_class_order"] = [1, 2, 3]
    rng = np.random.default_rng(1)
    for index in range(4):
        truth = random_case(rng)
        prediction = np.where(rng.random(truth.shape) < 0.8, truth, 0)
        if index < 2:  # a class in neither, a class in one of them
            truth[truth == 3] = 0
        if index == 0:
            prediction[prediction == 3] = 0
        write(tmp_path / "truth", f"case{index}", truth)
        write(tmp_path / "prediction", f"case{index}", prediction)
    classes = Classes.from_dataset_json(description)
    values = [v if regions and len(v) > 1 else v[0] for v in classes.foreground.values()]
    theirs = compute_metrics_on_folder(
        str(tmp_path / "truth"),
        str(tmp_path / "prediction"),
        None,
        SimpleITKIO(),
        ".nii.gz",
        values,
        num_processes=1,
    )
    ours = score_folder(
        tmp_path / "prediction", tmp_path / "truth", description, [f"case{i}" for i in range(4)], tolerance_mm=1.0
    )
    assert ours.mean_dice == pytest.approx(theirs["foreground_mean"]["Dice"], abs=1e-6)
    for (name, score), value in zip(ours.per_class.items(), values, strict=True):
        assert score.dice == pytest.approx(theirs["mean"][value]["Dice"], abs=1e-6), name
    for case, entry in zip(ours.cases, theirs["metric_per_case"], strict=True):
        for score, value in zip(case.classes.values(), values, strict=True):
            assert score.dice == pytest.approx(entry["metrics"][value]["Dice"], abs=1e-6, nan_ok=True)


def test_ignored_voxels_do_not_count(tmp_path: Path) -> None:
    description = LABELS | {"labels": {"background": 0, "a": 1, "ignore": 2}}
    truth = box((3, 5, 5)).astype(int)
    truth[:, 15:] = 2
    write(tmp_path / "truth", "x", truth)
    write(tmp_path / "prediction", "x", box((3, 5, 5), (4, 19, 10)))
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", description, ["x"])
    assert list(scores.per_class) == ["a"]
    assert scores.mean_dice == 1.0 and scores.per_class["a"].hd95_mm == 0.0
    assert "ignore" in policies(scores, has_ignore_label=True)


def test_a_class_that_is_nowhere_makes_nnunets_mean_undefined(tmp_path: Path) -> None:
    for folder in ("truth", "prediction"):
        write(tmp_path / folder, "x", box((3, 5, 5)))
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])
    assert math.isnan(scores.mean_dice) and scores.per_class["a"].dice == 1.0
    assert scores.cases[0].mean_dice == 1.0
    assert scores.defined_distances("a") == 1 and scores.defined_distances("b") == 0
    assert scores.mean_hd95_mm == 0.0


def test_default_tolerance(tmp_path: Path) -> None:
    for folder in ("truth", "prediction"):
        write(tmp_path / folder, "fine", box((3, 5, 5)), spacing=(3.0, 0.7, 0.7))
        write(tmp_path / folder, "coarse", box((3, 5, 5)), spacing=(5.0, 1.5, 1.4))
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["fine"])
    assert scores.tolerance_mm == 1.0
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["fine", "coarse"])
    assert scores.tolerance_mm == pytest.approx(1.5)
    assert "1.5 mm" in policies(scores, has_ignore_label=False)["surface_dice"]
    assert default_tolerance_mm([]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((12, 24, 23))}, "shape"),
        ({"spacing": (3.0, 1.0, 1.1)}, "spacing"),
        ({"origin": (5.0, -7.0, 12.0)}, "origin"),
    ],
)
def test_other_geometry_is_an_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "truth", "x", box((3, 5, 5)))
    write(tmp_path / "prediction", **({"case": "x", "labels": box((3, 5, 5))} | change))  # type: ignore[arg-type]
    with pytest.raises(LabelMapError, match=rf"case 'x': {message} of truth and prediction differ"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])


def test_missing_prediction_and_bad_arguments(tmp_path: Path) -> None:
    write(tmp_path / "truth", "x", box((3, 5, 5)))
    with pytest.raises(LabelMapError, match="case 'x' has no label map"):
        score_folder(tmp_path, tmp_path / "truth", LABELS, ["x"])
    with pytest.raises(ValueError, match="cases is empty"):
        score_folder(tmp_path, tmp_path / "truth", LABELS, [])
    with pytest.raises(ValueError, match="tolerance_mm must be finite and not negative, not -1"):
        score_folder(tmp_path, tmp_path / "truth", LABELS, ["x"], tolerance_mm=-1)


def test_classes_follow_nnunets_order() -> None:
    classes = Classes.from_dataset_json({"labels": {"background": 0, "second": 2, "first": 1}})
    assert classes.heads == ["background", "first", "second"]
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    classes = Classes.from_dataset_json(json.loads(json.dumps(regions)))
    assert classes.heads == ["whole", "core"] and classes.ignore_label == 3
    assert classes.foreground == {"whole": (1, 2), "core": (2,)}


def test_nanmean() -> None:
    assert nanmean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(nanmean([math.nan])) and math.isnan(nanmean([]))


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = ["b", "a", "c"]
    for name in names:
        truth = random_case(rng)
        write(tmp_path / "truth", name, truth)
        write(tmp_path / "prediction", name, np.where(rng.random(truth.shape) < 0.8, truth, 0))
    alone = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, names)
    together = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, names, processes=2)
    assert [case.case for case in together.cases] == ["a", "b", "c"]
    assert repr(together) == repr(alone)  # NaN too
    (tmp_path / "prediction" / "b.nii.gz").unlink()
    with pytest.raises(LabelMapError, match="case 'b' has no label map"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, names, processes=2)
    with pytest.raises(ValueError, match="processes must be at least 1, not 0"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, names, processes=0)


@pytest.mark.parametrize("left", [0, 40, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, left: float) -> None:
    """ITK would read the half of a file and fill the rest with noise."""
    truth = random_case(np.random.default_rng(3))
    for folder in ("truth", "prediction"):
        write(tmp_path / folder, "x", truth)
    file = tmp_path / "prediction" / "x.nii.gz"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(LabelMapError, match=r"case 'x': .*x\.nii\.gz cannot be read; it is truncated.* make it again"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    for folder in ("truth", "prediction"):
        write(tmp_path / folder, "x", random_case(np.random.default_rng(3)))
    file = tmp_path / "prediction" / "x.nii.gz"
    content = bytearray(file.read_bytes())
    content[-6] ^= 0xFF  # of the checksum
    file.write_bytes(content)
    with pytest.raises(LabelMapError, match="cannot be read"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.5])
def test_numbers_that_are_no_labels(tmp_path: Path, odd: float) -> None:
    write(tmp_path / "truth", "x", box((3, 5, 5)))
    write(tmp_path / "prediction", "x", box((3, 5, 5)))
    image = sitk.ReadImage(str(tmp_path / "prediction" / "x.nii.gz"), sitk.sitkFloat32)
    image[4, 4, 4] = odd
    sitk.WriteImage(image, str(tmp_path / "prediction" / "x.nii.gz"))
    with pytest.raises(LabelMapError, match=rf"x\.nii\.gz is no label map: 1 voxels .* such as {odd}"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])


def test_rounded_labels_are_labels(tmp_path: Path) -> None:
    write(tmp_path / "truth", "x", box((3, 5, 5)))
    write(tmp_path / "prediction", "x", box((3, 5, 5)))
    image = sitk.ReadImage(str(tmp_path / "prediction" / "x.nii.gz"), sitk.sitkFloat32) * 0.9999
    sitk.WriteImage(image, str(tmp_path / "prediction" / "x.nii.gz"))
    scores = score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])
    assert scores.per_class["a"].dice == 1.0


@pytest.mark.parametrize("folder", ["truth", "prediction"])
def test_values_that_dataset_json_lacks(tmp_path: Path, folder: str) -> None:
    for each in ("truth", "prediction"):
        write(tmp_path / each, "x", box((3, 5, 5)) * (7 if each == folder else 1))
    with pytest.raises(LabelMapError, match=rf"{folder}/x\.nii\.gz holds the label values 7, .* only 0, 1, 2, 3"):
        score_folder(tmp_path / "prediction", tmp_path / "truth", LABELS, ["x"])


def test_check_cases(tmp_path: Path) -> None:
    for name in ("a", "b", "x"):
        write(tmp_path, name, box((3, 5, 5)))
    (tmp_path / "summary.json").write_text("{}")
    check_cases(tmp_path, ["x", "a", "b"], ".nii.gz")
    with pytest.raises(LabelMapError, match=r"2 of 4 cases are missing: c, d; 1 files are of other cases: x\. Predict"):
        check_cases(tmp_path, ["a", "b", "c", "d"], ".nii.gz")
    with pytest.raises(LabelMapError, match="1 of 1 cases are missing: a"):
        check_cases(tmp_path / "nowhere", ["a"], ".nii.gz")
