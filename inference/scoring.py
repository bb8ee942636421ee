"""Scores of predicted segmentations: Dice, HD95, surface Dice and volumes, for each case and class.

Dice follows nnU-Net to the last digit. Distances are MONAI's, in millimetres.
"""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from masksam_nnunet.errors import DataError

from .label_maps import Classes, LabelMap, read_label_map

POLICIES = {
    "dice": (
        "Dice per case and class as nnU-Net defines it: undefined where the class is in neither truth nor prediction, "
        "0 where it is in one of them only. Background is excluded."
    ),
    "hd95_mm": (
        "HD95 is the 95th percentile of the distances from each boundary to the other, the larger of the two "
        "directions, in mm between boundary voxels. It is undefined, and left out of means, where truth or prediction "
        "lacks the class."
    ),
    "surface_dice": (
        "Surface Dice (normalised surface distance) is the share of both surfaces that lies within {tolerance:g} mm of "
        "the other; surfaces are taken at sub-voxel resolution and weighted by area. It is undefined where the class "
        "is in neither truth nor prediction, 0 where it is in one of them only."
    ),
    "volume_error_ml": (
        "Volume error is the predicted volume minus the true one, in ml, positive where too much is predicted; 0 where "
        "the class is rightly not predicted, undefined for two-dimensional images."
    ),
    "ignore": "Voxels with the ignore label in the truth count for nothing.",
}


def policies(tolerance_mm: float, has_ignore_label: bool) -> dict[str, str]:
    """What each metric means, for a report."""
    texts = {name: text.format(tolerance=tolerance_mm) for name, text in POLICIES.items()}
    return texts if has_ignore_label else {name: text for name, text in texts.items() if name != "ignore"}


def score_folder(
    predictions: Path,
    truths: Path,
    dataset_json: Mapping[str, Any],
    cases: Sequence[str],
    tolerance_mm: float,
    processes: int = 1,
) -> pd.DataFrame:
    """Score ``cases``, each a file ``CASE`` + file_ending in both folders.

    Args:
        predictions: folder of predicted label maps.
        truths: folder of true label maps.
        dataset_json: the dataset's description.
        cases: at least one.
        tolerance_mm: of the surface Dice.
        processes: the scores do not depend on their number.

    Returns:
        A table with the columns ``case, class, metric, value``, sorted by case, with the metrics of
        :func:`score_masks`; NaN where a metric is undefined.

    Raises:
        DataError: a file is missing, unreadable or holds values that dataset.json does not have, or truth and
            prediction differ in shape, spacing, origin or direction.
    """
    score = partial(_score_files, Path(predictions), Path(truths), dict(dataset_json), tolerance_mm)
    names = sorted(cases)
    if processes == 1 or len(names) == 1:
        return pd.concat(map(score, names), ignore_index=True)
    # Spawned, because a fork of a process with PyTorch's threads can hang.
    pool = ProcessPoolExecutor(min(processes, len(names)), multiprocessing.get_context("spawn"))
    try:
        return pd.concat(pool.map(score, names), ignore_index=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"{predictions}: a process that scored these cases was killed, probably for lack of memory; score with "
            f"fewer than {processes} processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _score_files(
    predictions: Path, truths: Path, dataset_json: Mapping[str, Any], tolerance_mm: float, case: str
) -> pd.DataFrame:
    truth, prediction = read_pair(predictions, truths, dataset_json, case)
    classes = Classes.from_dataset_json(dataset_json)
    counted = truth.labels != classes.ignore_label  # all, where there is none
    lines, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number in the last digit, and workers would fight for cores
    try:
        for name, values in classes.foreground.items():
            true, predicted = (np.isin(one.labels, values) & counted for one in (truth, prediction))
            scores = score_masks(true, predicted, truth.grid.spacing, tolerance_mm)
            lines += [(case, name, metric, value) for metric, value in scores.items()]
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(lines, columns=["case", "class", "metric", "value"])


def read_pair(predictions: Path, truths: Path, dataset_json: Mapping[str, Any], case: str) -> tuple[LabelMap, LabelMap]:
    """Read truth and prediction of a case, which must lie on one grid.

    Raises:
        DataError: as :func:`score_folder`.
    """
    truth, prediction = (read_label_map(folder, case, dataset_json) for folder in (truths, predictions))
    if not truth.grid.placement and truth.grid.shape == prediction.grid.shape:
        # nnU-Net copies predictions without the .json beside a TIFF, which holds its spacing.
        prediction = replace(prediction, grid=truth.grid)
    if difference := truth.grid.difference(prediction.grid):
        what, one, other = difference
        raise DataError(f"case {case!r}: {what} of truth and prediction differ ({one} and {other})")
    return truth, prediction


def cases_in(folder: Path, file_ending: str) -> list[str]:
    """Names of the cases that a folder has files of, sorted; empty where there is no such folder."""
    folder = Path(folder)
    files = (file.name for file in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(name.removesuffix(file_ending) for name in files if name.endswith(file_ending) and name[0] != ".")


def score_masks(
    truth: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Score one pair of masks (D, H, W) with a spacing in mm along the same axes.

    With a single slice, distances are measured in the plane and volumes are NaN.

    Returns:
        ``dice`` and ``surface_dice`` (0 to 1), ``hd95_mm``, ``truth_ml``, ``predicted_ml``, and ``volume_error_ml``,
        which is predicted minus true volume; NaN where undefined.
    """
    hits = int(np.count_nonzero(truth & prediction))
    in_truth, in_prediction = int(np.count_nonzero(truth)), int(np.count_nonzero(prediction))
    dice = 2 * hits / (in_truth + in_prediction) if in_truth + in_prediction else math.nan
    hd95, surface_dice = math.nan, (0.0 if in_truth + in_prediction else math.nan)
    flat = truth.shape[0] == 1
    if in_truth and in_prediction:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice  # takes seconds

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
    truth_ml, predicted_ml = in_truth * voxel_ml, in_prediction * voxel_ml
    return {
        "dice": dice,
        "hd95_mm": hd95,
        "surface_dice": surface_dice,
        "truth_ml": truth_ml,
        "predicted_ml": predicted_ml,
        "volume_error_ml": predicted_ml - truth_ml,
    }


def _common_box(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Crop two masks of one shape, not both empty, to what they cover together and one voxel around it.

    Distances stay the same, since beyond lies only background; MONAI copies whole volumes before it crops them itself.
    """
    (box,) = find_objects((one | other).view(np.uint8))
    around = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
    return [one[around], other[around]]


def default_tolerance_mm(truths: Iterable[LabelMap]) -> float:
    """1 mm, or the largest in-plane voxel size where that is larger: less cannot be resolved.

    Slices may lie along any axis: in-plane are the two smaller of a volume's voxel sizes.
    """
    return max([1.0, *(float(sorted(truth.grid.spacing)[1]) for truth in truths)])
