"""Worst, median and best case as pictures, with every prediction before post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from masksam_nnunet.errors import MaskSAMError, in_short
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.inference.report.figures import CaseImages, draw_case
from masksam_nnunet.inference.report.html import Picture, number
from masksam_nnunet.plans.images import read_image

from .results import MEAN, METRICS, BenchmarkResults
from .statistics import averaged


def case_means(results: BenchmarkResults, metric: str) -> pd.DataFrame:
    """The mean over classes of a metric: a line for each case, a column for each row."""
    values = averaged(results.scores)
    chosen = values[(values["metric"] == metric) & (values["class"] == MEAN)]
    return chosen.pivot(index="case", columns="method", values="value")[[row.name for row in results.rows]]


def choose_cases(results: BenchmarkResults) -> dict[str, str]:
    """Worst, median and best case by the mean Dice of the focus, each with this word; fewer where there are fewer."""
    dice = case_means(results, "dice")[results.focus.name].sort_values(kind="stable")
    ordered = list(dice.dropna().index) or list(dice.index)
    if len(ordered) == 1:
        return {ordered[0]: "Only case"}
    chosen = {ordered[0]: "Worst case", ordered[len(ordered) // 2]: "Median case"} if len(ordered) > 2 else {}
    return chosen | {ordered[0]: "Worst case", ordered[-1]: "Best case"}


def draw_cases(results: BenchmarkResults) -> list[Picture]:
    """A picture of each of :func:`choose_cases`. Where files are missing it has no PNG, and its caption says why."""
    dice, text = case_means(results, "dice"), number(METRICS["dice"].digits)
    pictures = []
    for case, place in choose_cases(results).items():
        name = results.focus.name
        caption = f"{place} by the mean Dice of {name} ({text(dice.loc[case, name])})"
        caption += "".join(f", validated in fold {fold}" for fold, names in results.cases.items() if case in names)
        notes = {row.name: f"Dice {text(dice.loc[case, row.name])}" for row in results.rows}
        try:
            png = draw_case(_read(results, case, notes), Classes.from_dataset_json(results.dataset_json))
        # A picture must not cost the report of days of training.
        except (MaskSAMError, OSError, RuntimeError, ValueError) as error:
            pictures.append(Picture(case, f"{caption}. It could not be drawn: {in_short(error)}", b""))
            continue
        caption += ". All columns share one grey window; cropped to what truth or any prediction labels."
        pictures.append(Picture(case, caption, png))
    return pictures


def _read(results: BenchmarkResults, case: str, notes: Mapping[str, str]) -> CaseImages:
    description: dict[str, Any] = dict(results.dataset_json)
    image, _ = read_image(_first_channel(results.images, case, description), description)
    truth = read_label_map(results.truths, case, description)
    rows = [row for row in results.rows if row.kind != "postprocessed"]
    predictions = {row.name: read_label_map(row.predictions, case, description).labels for row in rows}
    for name, labels in {"truth": truth.labels, **predictions}.items():
        if labels.shape != image[0].shape:
            raise ValueError(f"the image of {case} has shape {image[0].shape}, {name} {labels.shape}")
    return CaseImages(image[0], truth.grid.spacing, truth.labels, predictions, results.focus.name, notes)


def _first_channel(images: Path, case: str, dataset_json: Mapping[str, Any]) -> Path:
    """Where nnU-Net looks: in dataset.json's own list, else by name."""
    listed = dataset_json.get("dataset", {})
    if case in listed:
        return images.parent / str(listed[case]["images"][0])
    file = images / f"{case}_0000{dataset_json['file_ending']}"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    return file
