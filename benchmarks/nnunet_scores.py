"""Our Dice against nnU-Net's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.evaluation.evaluate_predictions import load_summary_json

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.scoring import Scores

from .errors import listed


def check_against_nnunet(scores: Scores, summary_json: Path, dataset_json: Mapping[str, Any]) -> None:
    """Our Dice must be nnU-Net's to 1e-6: of each case, each class, and the mean; NaN in both is the same.

    Args:
        scores: of the folder that ``summary_json`` is about.
        summary_json: nnU-Net's.
        dataset_json: names the classes that nnU-Net numbers.

    Raises:
        BenchmarkError: naming what differs, or that the file is not readable.
    """
    try:
        summary = load_summary_json(str(summary_json))
        ending = dataset_json["file_ending"]
        by_case = {Path(e["prediction_file"]).name.removesuffix(ending): e for e in summary["metric_per_case"]}
        theirs = {case: {_key(k): v["Dice"] for k, v in e["metrics"].items()} for case, e in by_case.items()}
        means = {_key(k): v["Dice"] for k, v in summary["mean"].items()}
        foreground = summary["foreground_mean"]["Dice"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{summary_json} is not there or not nnU-Net's summary ({error!r}); let nnU-Net score the folder again, "
            "with nnUNetv2_evaluate_folder, or nnUNetv2_train --val for a fold"
        ) from error
    ours = {case.case: case.classes for case in scores.cases}
    if ours.keys() != theirs.keys():
        raise BenchmarkError(
            f"{summary_json} is about other cases: it lacks {listed(ours.keys() - theirs.keys())} and has "
            f"{listed(theirs.keys() - ours.keys())} beside those that were scored; remove files of other cases from "
            "that folder, and let nnU-Net score it again"
        )
    values = {name: _key(value) for name, value in Classes.from_dataset_json(dataset_json).foreground.items()}
    lacking = [name for name, value in values.items() if value not in means]
    if lacking:
        raise BenchmarkError(
            f"{summary_json} lacks the classes {listed(lacking)} of dataset.json; let nnU-Net score the folder again "
            "with this dataset.json"
        )
    differing = [
        f"{case}, {name}: {classes[name].dice:.6f} here, {theirs[case].get(value, math.nan):.6f} there"
        for case, classes in ours.items()
        for name, value in values.items()
        if not _same(classes[name].dice, theirs[case].get(value, math.nan))
    ]
    differing += [
        f"mean of {name}: {scores.per_class[name].dice:.6f} here, {means[value]:.6f} there"
        for name, value in values.items()
        if not _same(scores.per_class[name].dice, means[value])
    ]
    if not _same(scores.mean_dice, foreground):
        differing.append(f"foreground mean: {scores.mean_dice:.6f} here, {foreground:.6f} there")
    if differing:
        raise BenchmarkError(
            f"Dice differs from nnU-Net's in {summary_json}: {'; '.join(differing[:5])}"
            + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
            + ". Files there or truths have changed since nnU-Net scored them: restore them, or let it score them again"
        )


def _key(label: int | tuple[int, ...]) -> tuple[int, ...]:
    """A label or region as nnU-Net's summary and ours both can be brought to."""
    return tuple(label) if isinstance(label, tuple | list) else (int(label),)


def _same(one: float, other: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=0.0, abs_tol=1e-6)
