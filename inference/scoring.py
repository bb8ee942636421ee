"""Scores of predicted segmentations: Dice, HD95 and surface Dice, per case and class.

Dice follows nnU-Net to the last digit, so that ``mean_dice`` is the ``foreground_mean`` of its summary.json. Distances
are MONAI's, in millimetres.
"""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from .label_maps import Classes, LabelMap, LabelMapError, check_same_geometry, check_values, class_mask, read_label_map

DICE_POLICY = (
    "Dice per case and class as nnU-Net defines it: undefined where the class is in neither truth nor prediction, 0 "
    "where it is in one of them only. A class's Dice is the mean over the cases where it is defined; the mean Dice is "
    "the mean over classes, background excluded (foreground_mean in nnU-Net's summary.json)."
)
HD95_POLICY = (
    "HD95 is the 95th percentile of the distances from each boundary to the other, the larger of the two directions, "
    "in mm between boundary voxels. It is undefined, and left out of means, where truth or prediction lacks the class."
)
SURFACE_DICE_POLICY = (
    "Surface Dice (normalised surface distance) is the share of both surfaces that lies within {tolerance:g} mm of the "
    "other; surfaces are taken at sub-voxel resolution and weighted by area. It is undefined where the class is in "
    "neither truth nor prediction, 0 where it is in one of them only."
)
VOLUME_POLICY = (
    "Volume error is the predicted volume minus the true one, in ml, positive where too much is predicted; 0 where the "
    "class is rightly not predicted, undefined for two-dimensional images."
)
IGNORE_POLICY = "Voxels with the ignore label in the truth count for nothing."


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class, in one case or averaged over cases; NaN where undefined.

    Attributes:
        dice: 0 to 1.
        hd95_mm: millimetres.
        surface_dice: 0 to 1, at the tolerance of :class:`Scores`.
        truth_ml: volume in the truth, millilitres; NaN for two-dimensional images.
        predicted_ml: volume in the prediction.
    """

    dice: float
    hd95_mm: float
    surface_dice: float
    truth_ml: float
    predicted_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Predicted minus true volume in millilitres; NaN for two-dimensional images."""
        return self.predicted_ml - self.truth_ml

    @property
    def relative_volume_error(self) -> float:
        """The volume error over the true volume; NaN where that is 0 or unknown."""
        return self.volume_error_ml / self.truth_ml if self.truth_ml else math.nan


@dataclass(frozen=True)
class CaseScore:
    """Scores of one case by class name."""

    case: str
    classes: Mapping[str, ClassScore]

    @property
    def mean_dice(self) -> float:
        """Mean over the classes where Dice is defined, for ranking cases; NaN if there is none."""
        return nanmean([score.dice for score in self.classes.values()])


@dataclass(frozen=True)
class Scores:
    """Scores of a folder of predictions.

    Attributes:
        cases: one entry per case, sorted by name.
        per_class: mean over the cases where a score is defined, by class name.
        mean_dice: mean of the classes' Dice as nnU-Net's summary.json has it: NaN if a class is nowhere.
        tolerance_mm: tolerance of the surface Dice.
    """

    cases: tuple[CaseScore, ...]
    per_class: Mapping[str, ClassScore]
    mean_dice: float
    tolerance_mm: float

    @property
    def mean_hd95_mm(self) -> float:
        """Mean over the classes where it is defined."""
        return nanmean([score.hd95_mm for score in self.per_class.values()])

    @property
    def mean_surface_dice(self) -> float:
        """Mean over the classes where it is defined."""
        return nanmean([score.surface_dice for score in self.per_class.values()])

    def defined_distances(self, name: str) -> int:
        """In how many cases the HD95 of class ``name`` is defined."""
        return sum(not math.isnan(case.classes[name].hd95_mm) for case in self.cases)


def score_folder(
    predictions: Path,
    truths: Path,
    dataset_json: Mapping[str, Any],
    cases: Sequence[str],
    tolerance_mm: float | None = None,
    processes: int = 1,
) -> Scores:
    """Score ``cases``, each a file ``CASE`` + file_ending in both folders.

    Args:
        predictions: folder of predicted label maps.
        truths: folder of true label maps, such as gt_segmentations.
        dataset_json: the dataset's description; labels or regions, with or without an ignore label.
        cases: names without file ending, at least one.
        tolerance_mm: tolerance of the surface Dice; by default :func:`default_tolerance_mm` of the truths.
        processes: workers, one case each at a time; the scores do not depend on it. They are spawned, so that a
            script that asks for several needs its ``if __name__ == "__main__"``.

    Raises:
        LabelMapError: for a file that is missing, unreadable or holds values that dataset.json does not have, or if
            truth and prediction differ in shape, spacing, origin or direction.
        ValueError: for no cases, no processes, or a tolerance that is negative or not finite.
    """
    if not cases:
        raise ValueError("cases is empty: there is nothing to score")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes}")
    if tolerance_mm is None:
        tolerance_mm = default_tolerance_mm(read_label_map(truths, case, dataset_json) for case in cases)
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm must be finite and not negative, not {tolerance_mm}")
    score = partial(_score_files, Path(predictions), Path(truths), dict(dataset_json), tolerance_mm)
    names = sorted(cases)
    if processes == 1 or len(names) == 1:
        return aggregate(
            [score(case) for case in names], tolerance_mm
        )  # one at a time: a folder need not fit in memory
    # Spawned: a fork of a process with PyTorch's threads can hang.
    pool = ProcessPoolExecutor(min(processes, len(names)), multiprocessing.get_context("spawn"))
    try:
        return aggregate(list(pool.map(score, names)), tolerance_mm)
    except BrokenProcessPool as error:
        raise LabelMapError(
            f"{predictions}: a process that scored these cases was killed, probably for lack of memory; score with "
            f"fewer than {processes} processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _score_files(
    predictions: Path, truths: Path, dataset_json: Mapping[str, Any], tolerance_mm: float, case: str
) -> CaseScore:
    truth, prediction = read_pair(predictions, truths, dataset_json, case)
    with _one_thread():
        return CaseScore(case, score_case(truth, prediction, Classes.from_dataset_json(dataset_json), tolerance_mm))


def read_pair(predictions: Path, truths: Path, dataset_json: Mapping[str, Any], case: str) -> tuple[LabelMap, LabelMap]:
    """Truth and prediction of a case, on one grid.

    Raises:
        LabelMapError: as :func:`score_folder`.
    """
    classes = Classes.from_dataset_json(dataset_json)
    maps = []
    for folder in (truths, predictions):
        maps.append(read_label_map(folder, case, dataset_json))
        check_values(folder / (case + dataset_json["file_ending"]), case, maps[-1], classes)
    truth, prediction = maps
    check_same_geometry(case, truth, prediction)
    return truth, prediction


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for PyTorch: its sums depend on their number in the last digit, and workers would fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cases_in(folder: Path, file_ending: str) -> list[str]:
    """Names of the cases that a folder has files of, sorted; empty where there is no such folder."""
    folder = Path(folder)
    files = (file.name for file in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(name.removesuffix(file_ending) for name in files if name.endswith(file_ending) and name[0] != ".")


def check_cases(folder: Path, cases: Iterable[str], file_ending: str) -> None:
    """Refuse a folder of predictions that are not exactly those of ``cases``.

    Raises:
        LabelMapError: with the cases that lack a file, and the files of other cases.
    """
    wanted, there = set(cases), set(cases_in(folder, file_ending))
    if wanted == there:
        return
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    parts = [f"{len(missing)} of {len(wanted)} cases are missing: {', '.join(missing)}"] if missing else []
    parts += [f"{len(extra)} files are of other cases: {', '.join(extra)}"] if extra else []
    raise LabelMapError(
        f"{folder} does not hold the predictions of the cases to score. {'; '.join(parts)}. Predict what is missing, "
        "take away what does not belong, or name the folder of these cases"
    )


def score_case(truth: LabelMap, prediction: LabelMap, classes: Classes, tolerance_mm: float) -> dict[str, ClassScore]:
    """Score one case; both label maps are (D, H, W) and share their geometry."""
    counted = np.ones(truth.labels.shape, dtype=bool)
    if classes.ignore_label is not None:
        counted = truth.labels != classes.ignore_label
    return {
        name: score_masks(
            class_mask(truth.labels, values) & counted,
            class_mask(prediction.labels, values) & counted,
            truth.spacing,
            tolerance_mm,
        )
        for name, values in classes.foreground.items()
    }


def score_masks(
    truth: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: Sequence[float], tolerance_mm: float
) -> ClassScore:
    """Score one pair of masks (D, H, W) with a spacing in mm along the same axes.

    With a single slice, distances are measured in the plane and volumes are NaN.
    """
    hits = int(np.count_nonzero(truth & prediction))
    in_truth, in_prediction = int(np.count_nonzero(truth)), int(np.count_nonzero(prediction))
    dice = 2 * hits / (in_truth + in_prediction) if in_truth + in_prediction else math.nan
    hd95, surface_dice = math.nan, (0.0 if in_truth + in_prediction else math.nan)
    flat = truth.shape[0] == 1
    if in_truth and in_prediction:
        masks = _common_box(*(mask[0] if flat else mask for mask in (prediction, truth)))
        one, other = (torch.from_numpy(mask)[None, None] for mask in masks)
        steps = [float(step) for step in (spacing[1:] if flat else spacing)]
        with warnings.catch_warnings():  # MONAI warns of an argument that MONAI itself passes
            warnings.simplefilter("ignore", FutureWarning)
            hd95 = float(compute_hausdorff_distance(one, other, True, percentile=95, spacing=steps))
            surface_dice = float(
                compute_surface_dice(one, other, [tolerance_mm], True, spacing=steps, use_subvoxels=True)
            )
    voxel_ml = math.nan if flat else float(np.prod(spacing)) / 1000
    return ClassScore(dice, hd95, surface_dice, in_truth * voxel_ml, in_prediction * voxel_ml)


def _common_box(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Two masks of one shape, not both empty, cut to what they cover together and one voxel around it.

    Distances stay the same, since beyond lies background only; MONAI copies whole volumes before it crops them itself.
    """
    (box,) = find_objects((one | other).view(np.uint8))
    around = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
    return [one[around], other[around]]


def default_tolerance_mm(truths: Iterable[LabelMap]) -> float:
    """1 mm, or the largest in-plane voxel size where that is larger: less cannot be resolved."""
    return max([1.0, *(float(max(truth.spacing[1:])) for truth in truths)])


def aggregate(cases: Sequence[CaseScore], tolerance_mm: float) -> Scores:
    """Average case scores over the cases where each is defined."""
    names = list(cases[0].classes)
    per_class = {
        name: ClassScore(*(nanmean([getattr(c.classes[name], f.name) for c in cases]) for f in fields(ClassScore)))
        for name in names
    }
    mean_dice = float(np.mean([per_class[name].dice for name in names]))
    return Scores(tuple(cases), per_class, mean_dice, tolerance_mm)


def policies(scores: Scores, has_ignore_label: bool) -> dict[str, str]:
    """What the numbers mean, in words, for a report."""
    texts = {
        "dice": DICE_POLICY,
        "hd95_mm": HD95_POLICY,
        "surface_dice": SURFACE_DICE_POLICY.format(tolerance=scores.tolerance_mm),
        "volume_error_ml": VOLUME_POLICY,
    }
    return texts | ({"ignore": IGNORE_POLICY} if has_ignore_label else {})


def nanmean(values: Sequence[float]) -> float:
    """Mean of what is defined; NaN, without numpy's warning, where nothing is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
