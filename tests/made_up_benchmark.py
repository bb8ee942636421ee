"""Results of a benchmark that never ran: generated scores, small images on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from masksam_nnunet.benchmarks.demo_report import MethodResult, Report
from masksam_nnunet.benchmarks.results import BenchmarkResults, Finding, FoldCompute, Method, Row, TestSetScore
from masksam_nnunet.benchmarks.statistics import aggregates, comparisons, policies
from masksam_nnunet.inference.history import History, TrainingStats
from masksam_nnunet.inference.report.html import Picture
from masksam_nnunet.inference.scoring import CaseScore, ClassScore, Scores, aggregate
from masksam_nnunet.inference.scoring import policies as score_policies

STATS = TrainingStats(
    train_seconds=240.4,
    iterations=1234,
    peak_memory_mb=987.6,
    peak_memory_of="process, resident",
    parameters=16_500_000,
    trainable_parameters=2_000_000,
    epochs=10,
    batch_size=2,
    patch_size=(24, 64, 64),
    device="cpu",
)
"""Of a training by the clock."""

FOLDS, CASES = 5, 20
"""Folds, and cases in each."""


def made_up_demo(
    methods: list[MethodResult],
    classes: Sequence[str],
    curves: Picture,
    dataset: str = "Dataset999_MadeUp",
    **others: Any,
) -> Report:
    """The demo's report of two cases."""
    about: dict[str, Any] = {"notes": ["A note."], "commands": [], "inside_pictures": []}
    return Report(
        dataset=dataset,
        phantoms=True,
        fold=0,
        cases=["case_b", "case_a"],
        training_cases=8,
        configuration="3d_fullres",
        batch_size=2,
        minutes=4.0,
        device="2 CPU cores",
        versions={"torch": "2.x"},
        scoring=score_policies(methods[0].scores, has_ignore_label=False),
        methods=methods,
        classes=dict.fromkeys(classes, "#e69f00"),
        curves=curves,
        case_pictures=[curves],
        **about | others,
    )


SHAPE = (12, 40, 48)
_METHODS = (
    Method("nnUNetTrainer", "nnUNetPlans", "3d_fullres"),
    Method("MaskSAMTrainer_tiny", "nnUNetPlans", "3d_fullres"),
    Method("nnUNetTrainer", "nnUNetResEncUNetLPlans", "3d_fullres"),
)
_SHIFT = (0.0, 0.02, 0.01, 0.025, 0.0, 0.02)  # of each row's Dice


def made_up_results(
    root: Path, classes: Sequence[str], absent: Sequence[str] = (), row_count: int = 3, resamples: int = 99
) -> BenchmarkResults:
    """Two methods and their ensemble, or with six rows: three methods, an ensemble, and two post-processed.

    The worst case of the first MaskSAM has a ``<script>`` in its name and no prediction of the first class.

    Args:
        root: where images and label maps of the cases that pictures need are written.
        classes: names of the foreground classes.
        absent: those of them that are in no truth and no prediction.
        row_count: 3 or 6.
        resamples: of the bootstrap.
    """
    generator = np.random.default_rng(7)
    names = [f"case {index:03d}" for index in range(FOLDS * CASES)]
    names[41] = "case 041 <script>alert(1)</script>".replace("/", "\u2215")  # a file's name has no slash
    fold_of = {name: index % FOLDS for index, name in enumerate(names)}
    difficulty = generator.normal(0.82, 0.06, len(names)).clip(0.4, 0.97)
    difficulty[41] = 0.35
    truth_ml = generator.uniform(1, 6, (len(names), len(classes)))
    dataset_json: dict[str, Any] = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **{name: value for value, name in enumerate(classes, 1)}},
        "numTraining": len(names),
        "file_ending": ".nii.gz",
    }
    scores = [_scores(generator, names, classes, absent, difficulty + shift, truth_ml, misses=41) for shift in _SHIFT]
    rows = [
        replace(row, scores=scores[index], fold_of=fold_of, predictions=root / f"predictions_{index}")
        for index, row in enumerate(_rows(row_count, scores[0], fold_of))
    ]
    _write_images(root, names, len(classes) - len(absent), [row.predictions for row in rows])
    test_scores = _scores(generator, names[:8], classes, absent, difficulty[:8], truth_ml[:8], misses=-1)
    ensemble = next(row for row in rows if row.kind == "ensemble")
    return BenchmarkResults(
        dataset="Dataset999_MadeUp",
        dataset_json=dataset_json,
        configuration="3d_fullres",
        folds=tuple(range(FOLDS)),
        cases={fold: tuple(name for name in names if fold_of[name] == fold) for fold in range(FOLDS)},
        rows=tuple(rows),
        aggregates=aggregates(rows, resamples=resamples),
        comparisons=comparisons(rows, resamples=resamples),
        findings=(
            Finding(True, "Fold 3 of MaskSAMTrainer_tiny was trained with other splits than that of nnUNetTrainer."),
            Finding(False, "Both methods read the same preprocessed data."),
        ),
        test_set=(TestSetScore("nnUNetTrainer, 5 folds", _METHODS[:1], test_scores, root),),
        best=ensemble.name,
        policies=policies(rows, has_ignore_label=False),
        versions={"Python": "3.11.9", "torch": "2.12.0", "nnunetv2": "2.8.1"},
        git_hash="0123456789abcdef0123456789abcdef01234567",
        commands=('masksam benchmark -d 999 -c 3d_fullres --out "my results"', "nnUNetv2_train 999 3d_fullres 0"),
        images=root / "imagesTr",
        truths=root / "labelsTr",
    )


def _rows(count: int, scores: Scores, fold_of: dict[str, int]) -> list[Row]:
    """Rows with everything but their own scores and predictions."""
    empty = Path()
    methods = [
        Row(name, "method", (method,), scores, fold_of, _compute(index), _histories(index), empty)
        for index, (name, method) in enumerate(
            zip(
                ("nnUNetTrainer", "MaskSAMTrainer_tiny", "nnUNetTrainer (nnUNetResEncUNetLPlans)"),
                _METHODS,
                strict=True,
            )
        )
    ]
    one, other = methods[:2]
    joint = f"{one.name} + {other.name}"
    ensemble = Row(
        joint, "ensemble", one.members + other.members, scores, fold_of, one.compute + other.compute, {}, empty
    )
    if count == 3:
        return [one, other, ensemble]
    processed = [
        replace(row, name=f"{row.name}, post-processed", kind="postprocessed", histories={}) for row in (one, other)
    ]
    return [*methods, ensemble, *processed]


def _scores(
    generator: np.random.Generator,
    names: Sequence[str],
    classes: Sequence[str],
    absent: Sequence[str],
    means: NDArray[np.float64],
    truth_ml: NDArray[np.float64],
    misses: int,
) -> Scores:
    cases = []
    for place, name in enumerate(names):
        found = {}
        for index, one in enumerate(classes):
            if one in absent:
                found[one] = ClassScore(math.nan, math.nan, math.nan, 0.0, 0.0)
                continue
            dice = float(np.clip(means[place] + generator.normal(-0.02 * index, 0.02), 0, 1))
            volume = float(truth_ml[place, index])
            missed = index == 0 and (place == misses or generator.random() < 0.03)
            found[one] = (
                ClassScore(0.0, math.nan, 0.0, volume, 0.0)
                if missed
                else ClassScore(
                    dice,
                    float(generator.gamma(2, 12 * (1 - dice))),
                    min(1.0, dice + 0.08),
                    volume,
                    float(volume * generator.normal(1, 0.1)),
                )
            )
        cases.append(CaseScore(name, found))
    return aggregate(sorted(cases, key=lambda case: case.case), 1.0)


def _compute(index: int) -> tuple[FoldCompute, ...]:
    folds = [
        FoldCompute(
            fold=fold,
            seconds=3600.0,
            peak_memory_mib=2048.0 + 100 * fold,
            peak_memory_of="process, resident",
            device="2 CPU cores",
            iterations=5000 + fold,
            epochs=20,
            parameters=16_500_000,
            trainable_parameters=2_000_000 if index else 16_500_000,
            checkpoint_bytes=120_000_000,
            resumed=int(fold == 2),
            git_hash="0123456789abcdef0123456789abcdef01234567",
            wall_seconds=3700.0,
        )
        for fold in range(FOLDS)
    ]
    if index == 1:
        not_told = ("seconds", "wall_seconds", "peak_memory_mib", "iterations", "epochs", "git_hash")
        nothing: dict[str, Any] = dict.fromkeys(not_told)
        folds[-1] = replace(folds[-1], **nothing, parameters=None, trainable_parameters=None, peak_memory_of="")
    return tuple(folds)


def _histories(index: int) -> dict[int, History]:
    generator = np.random.default_rng(index)
    found = {}
    for fold in range(FOLDS):
        epochs = np.arange(1, 20 + fold)
        noise = generator.normal(0, 0.02, (3, len(epochs)))
        dice = (0.9 - 0.05 * index) * (1 - np.exp(-epochs / 5)) + noise[0]
        dice[0] = math.nan  # nothing labelled in the first patches
        loss = (1 + 3 * index) * np.exp(-epochs / 8) - 0.8
        found[fold] = History(
            tuple(float(t) for t in epochs * (180.0 + 20 * index)),
            tuple((loss + noise[1]).tolist()),
            tuple((loss + 0.1 + noise[2]).tolist()),
            tuple(dice.tolist()),
        )
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
    for folder in (root / "imagesTr", root / "labelsTr", *predictions):
        folder.mkdir(parents=True, exist_ok=True)
    shifted = {
        folder: np.roll(truth, (index % 3, -(index % 2)), axis=(1, 2)) for index, folder in enumerate(predictions)
    }
    for name in names:
        _write(root / "imagesTr" / f"{name}_0000.nii.gz", image)
        _write(root / "labelsTr" / f"{name}.nii.gz", truth)
        for folder, labels in shifted.items():
            _write(folder / f"{name}.nii.gz", labels)


def _write(path: Path, array: NDArray[Any]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.5))
    sitk.WriteImage(image, str(path))
