"""Results of a benchmark that never ran: generated scores, small images on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy.typing import NDArray

from masksam_nnunet.benchmarks.results import BenchmarkResults, Finding, FoldCompute, ModelName, Row
from masksam_nnunet.benchmarks.statistics import compare, default_pairs, patient_of, summarise
from masksam_nnunet.benchmarks.statistics import policies as statistics_policies
from masksam_nnunet.inference.provenance import History
from masksam_nnunet.inference.scoring import policies as score_policies

FOLDS, CASES = 5, 9
"""Folds, and cases in each."""
SHAPE = (12, 40, 48)
SCORES = ("dice", "hd95_mm", "surface_dice", "truth_ml", "predicted_ml", "volume_error_ml")
WORST = "case 041 <script>alert(1)</script>".replace("/", "\u2215")  # a file's name has no slash
_METHODS = (
    ModelName("nnUNetTrainer", "nnUNetPlans", "3d_fullres"),
    ModelName("MaskSAMTrainer_tiny", "nnUNetPlans", "3d_fullres"),
    ModelName("nnUNetTrainer", "nnUNetResEncUNetLPlans", "3d_fullres"),
)
_NAMES = ("nnUNetTrainer", "MaskSAMTrainer_tiny", "nnUNetTrainer (nnUNetResEncUNetLPlans)")
_SHIFT = (0.0, 0.02, 0.01, 0.025, 0.0, 0.02)  # of each row's Dice


def long_table(values: Mapping[tuple[str, str, str], Mapping[str, float]], **columns: Any) -> pd.DataFrame:
    """The long table of scores from metrics by (method, case, class); patients as the case names show."""
    lines = [(*key, metric, value) for key, metrics in values.items() for metric, value in metrics.items()]
    table = pd.DataFrame(lines, columns=["method", "case", "class", "metric", "value"])
    patients = patient_of(sorted(table["case"].unique()), None)
    table = table.assign(kind="method", fold=0, patient=table["case"].map(patients)).assign(**columns)
    return table[["method", "kind", "fold", "patient", "case", "class", "metric", "value"]]


def made_up_results(
    root: Path,
    classes: Sequence[str],
    absent: Sequence[str] = (),
    row_count: int = 3,
    folds: int = FOLDS,
    cases: int = CASES,
) -> BenchmarkResults:
    """Two methods and their ensemble, or with six rows: three methods, an ensemble, and two post-processed.

    With five folds the worst case of the first MaskSAM has a ``<script>`` in its name and no prediction of the first
    class. With one fold it is what a demo finds.

    ``root`` is where images and label maps are written, ``absent`` are classes in no truth and no prediction,
    ``row_count`` is 2, 3 or 6, ``cases`` the number in each fold.
    """
    generator = np.random.default_rng(7)
    names = [f"case {index:03d}" for index in range(folds * cases)]
    difficulty = generator.normal(0.82, 0.06, len(names)).clip(0.4, 0.97)
    if len(names) > 41:
        names[41], difficulty[41] = WORST, 0.35
    truth_ml = generator.uniform(1, 6, (len(names), len(classes)))
    rows = [replace(row, predictions=root / f"predictions_{i}") for i, row in enumerate(_rows(row_count))]
    fold_of = {name: index % folds for index, name in enumerate(names)}

    def made(row: str, chosen: Sequence[str], means: NDArray[np.float64]) -> dict[Any, dict[str, float]]:
        return {
            (row, case, one): _scores(generator, means[place] - 0.02 * index, float(truth_ml[place, index]))
            if one not in absent
            else dict(zip(SCORES, (math.nan, math.nan, math.nan, 0.0, 0.0, 0.0), strict=True))
            for place, case in enumerate(chosen)
            for index, one in enumerate(classes)
        }

    values: dict[Any, dict[str, float]] = {}
    for row, shift in zip(rows, _SHIFT, strict=False):
        values |= made(row.name, names, difficulty + shift)
        missed = {"dice": 0.0, "hd95_mm": math.nan, "surface_dice": 0.0, "predicted_ml": 0.0}
        values[row.name, names[-1] if len(names) <= 41 else WORST, classes[0]] |= missed
    scores = long_table(values)
    kinds = {row.name: row.kind for row in rows}
    scores = scores.assign(kind=scores["method"].map(kinds), fold=scores["case"].map(fold_of))
    test_set = long_table(made("nnUNetTrainer, 5 folds", names[:8], difficulty))
    _write_images(root, names, len(classes) - len(absent), [row.predictions for row in rows])
    methods = [row for row in rows if row.kind == "method"]
    return BenchmarkResults(
        dataset="Dataset999_MadeUp",
        dataset_json={
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, **{name: value for value, name in enumerate(classes, 1)}},
            "numTraining": len(names),
            "file_ending": ".nii.gz",
        },
        configuration="3d_fullres",
        cases={fold: tuple(name for name in names if fold_of[name] == fold) for fold in range(folds)},
        tolerance_mm=1.0,
        rows=tuple(rows),
        scores=scores,
        means=summarise(scores, resamples=49),
        comparisons=compare(scores, default_pairs(rows), resamples=49),
        test_set=test_set[["method", "case", "class", "metric", "value"]].iloc[: None if folds > 1 else 0],
        compute={row.name: _compute(index, folds) for index, row in enumerate(methods)},
        histories={row.name: _histories(index, folds) for index, row in enumerate(methods)},
        findings=(
            Finding(True, "Fold 3 of MaskSAMTrainer_tiny was trained with other splits than that of nnUNetTrainer."),
            Finding(False, "Both methods read the same preprocessed data."),
        ),
        best=rows[-1].name if row_count == 3 else None,
        policies=score_policies(1.0, False) | statistics_policies(patient_of(names, None), False),
        versions={"Python": "3.11.9", "torch": "2.12.0", "nnunetv2": "2.8.1"},
        git_hash="0123456789abcdef0123456789abcdef01234567",
        commands=('masksam benchmark -d 999 -c 3d_fullres --out "my results"', "nnUNetv2_train 999 3d_fullres 0"),
        images=root / "imagesTr",
        truths=root / "labelsTr",
    )


def _rows(count: int) -> list[Row]:
    methods = [Row(name, "method", (method,), Path()) for name, method in zip(_NAMES, _METHODS, strict=True)]
    one, other = methods[:2]
    ensemble = Row(f"{one.name} + {other.name}", "ensemble", one.members + other.members, Path())
    processed = [replace(row, name=f"{row.name}, post-processed", kind="postprocessed") for row in (one, other)]
    return {2: [one, other], 3: [one, other, ensemble], 6: [*methods, ensemble, *processed]}[count]


def _scores(generator: np.random.Generator, mean: float, truth_ml: float) -> dict[str, float]:
    dice = float(np.clip(mean + generator.normal(0, 0.02), 0, 1))
    predicted_ml = truth_ml * float(generator.normal(1, 0.1))
    hd95 = float(generator.gamma(2, 12 * (1 - dice)))
    values = (dice, hd95, min(1.0, dice + 0.08), truth_ml, predicted_ml, predicted_ml - truth_ml)
    return dict(zip(SCORES, values, strict=True))


def _compute(index: int, folds: int) -> tuple[FoldCompute, ...]:
    common: dict[str, Any] = {"peak_memory_of": "process, resident", "device": "2 CPU cores", "epochs": 20}
    common |= {"seconds": 3600.0, "wall_seconds": 3700.0, "parameters": 16_500_000, "checkpoint_bytes": 120_000_000}
    common |= {"git_hash": "0123456789abcdef" * 2, "trainable_parameters": 2_000_000 if index else 16_500_000}
    found = [
        FoldCompute(
            fold=fold,
            peak_memory_mib=2048.0 + 100 * fold,
            iterations=5000 + fold,
            resumed=int(fold == 2),
            versions={"torch": "2.12.0", "nnunetv2": "2.8.1" if fold or not index else "2.8.0"},
            **common,
        )
        for fold in range(folds)
    ]
    if index == 1 and folds > 1:
        unknown = ("seconds", "wall_seconds", "peak_memory_mib", "iterations", "epochs", "git_hash", "parameters")
        nothing: dict[str, Any] = dict.fromkeys((*unknown, "trainable_parameters"))
        found[-1] = replace(found[-1], **nothing, peak_memory_of="")
    return tuple(found)


def _histories(index: int, folds: int) -> dict[int, History]:
    found = {}
    for fold in range(folds):
        epochs = np.arange(1, 20 + fold)
        dice = (0.9 - 0.05 * index) * (1 - np.exp(-epochs / 5)) + 0.01 * fold
        dice[0] = math.nan  # nothing labelled in the first patches
        loss = (1 + 3 * index) * np.exp(-epochs / 8) - 0.8 + 0.02 * fold
        curves = (epochs * (180.0 + 20 * index), loss, loss + 0.1, dice)
        found[fold] = History(*(tuple(curve.tolist()) for curve in curves), parameters=13)
    return found


def _write_images(root: Path, names: Sequence[str], values: int, predictions: Sequence[Path]) -> None:
    """Ellipsoids in noise; predictions shifted by some voxels. All cases share them: pictures need three."""
    generator = np.random.default_rng(1)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    truth = np.zeros(SHAPE, dtype=np.uint8)
    columns = max(1, math.ceil(math.sqrt(values)))
    for value in range(1, values + 1):
        row, column = divmod(value - 1, columns)
        centre = (6, (row + 0.5) * SHAPE[1] / columns, (column + 0.5) * SHAPE[2] / columns)
        radius = 0.42 * min(SHAPE[1:]) / columns
        inside = ((z - centre[0]) / 5) ** 2 + ((y - centre[1]) / radius) ** 2 + ((x - centre[2]) / radius) ** 2 < 1
        truth[inside] = value
    image = (60 * (truth > 0) + 4 * truth + generator.normal(100, 12, SHAPE)).astype(np.float32)
    made = {"imagesTr": image, "labelsTr": truth}
    made |= {folder.name: np.roll(truth, (i % 3, -(i % 2)), axis=(1, 2)) for i, folder in enumerate(predictions)}
    for folder, array in made.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        first, *others = (root / folder / f"{name}{'_0000' * (folder == 'imagesTr')}.nii.gz" for name in names)
        written = sitk.GetImageFromArray(array)
        written.SetSpacing((1.0, 1.0, 2.5))
        sitk.WriteImage(written, str(first))
        for other in others:
            os.link(first, other)
