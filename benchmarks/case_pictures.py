"""Worst, median and best case as pictures, with every row's prediction and its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksam_nnunet.inference.label_maps import Classes, LabelMapError, read_label_map, read_volume
from masksam_nnunet.inference.report.case_choice import choose_cases
from masksam_nnunet.inference.report.figures import CaseImages, draw_case
from masksam_nnunet.inference.report.html import Picture

from .case_values import case_value, case_values
from .lookup import focus
from .metric_styles import STYLES
from .results import BenchmarkResults


@dataclass(frozen=True)
class CasePicture:
    """One case.

    Attributes:
        case: its name.
        why: worst, median or best, by what, and which fold validated it.
        picture: None if it could not be drawn.
        problem: why it could not.
        scores: each row's name with its cells, one for each metric.
    """

    case: str
    why: str
    picture: Picture | None
    problem: str
    scores: list[tuple[str, list[str]]]


def draw_cases(results: BenchmarkResults) -> list[CasePicture]:
    """The cases that are worst, median and best by the mean Dice of the :func:`focus`."""
    row = focus(results)
    ranking = case_values(row.scores, "dice", None)
    text = STYLES["dice"].text()
    drawn = []
    for case, place in choose_cases(ranking).items():
        fold = row.fold_of.get(case)
        why = f"{place} by the mean Dice of {row.name} ({text(ranking[case])})"
        why += "" if fold is None else f", validated in fold {fold}"
        drawn.append(_draw(results, case, why, row.name))
    return drawn


def _draw(results: BenchmarkResults, case: str, why: str, judged: str) -> CasePicture:
    scores = [(row.name, _cells(results, row.name, case)) for row in results.rows]
    notes = {name: f"Dice {cells[0]}" for name, cells in scores}
    try:
        images = _read(results, case, judged, notes)
    # A picture that lacks its files must not cost the report of days of training; the page says what lacks.
    except (LabelMapError, OSError, RuntimeError, ValueError) as error:
        return CasePicture(case, why, None, f"{type(error).__name__}: {error}", scores)
    png = draw_case(images, Classes.from_dataset_json(results.dataset_json))
    caption = f"{why}. All columns share one grey window; cropped to what truth or any prediction labels."
    return CasePicture(case, why, Picture(case, caption, png), "", scores)


def _cells(results: BenchmarkResults, name: str, case: str) -> list[str]:
    (row,) = (row for row in results.rows if row.name == name)
    found = [score for score in row.scores.cases if score.case == case]
    return [style.text()(case_value(found[0], m, None) if found else math.nan) for m, style in STYLES.items()]


def _read(results: BenchmarkResults, case: str, judged: str, notes: Mapping[str, str]) -> CaseImages:
    description: dict[str, Any] = dict(results.dataset_json)
    image, _ = read_volume([_first_channel(results.images, case, description)], description)
    truth = read_label_map(results.truths, case, description)
    predictions = {row.name: read_label_map(row.predictions, case, description).labels for row in results.rows}
    for name, labels in {"truth": truth.labels, **predictions}.items():
        if labels.shape != image[0].shape:
            raise ValueError(f"the image of {case} has shape {image[0].shape}, {name} {labels.shape}")
    return CaseImages(image[0], truth.spacing, truth.labels, predictions, judged, notes)


def _first_channel(images: Path, case: str, dataset_json: Mapping[str, Any]) -> Path:
    """Where nnU-Net looks: in dataset.json's own list, else by name."""
    listed = dataset_json.get("dataset", {})
    if case in listed:
        return images.parent / str(listed[case]["images"][0])
    file = images / f"{case}_0000{dataset_json['file_ending']}"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    return file
