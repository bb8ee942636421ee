"""All pictures of a benchmark's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from masksam_nnunet.inference.report.html import Picture

from .box_plots import draw_class_boxes, draw_metric_boxes
from .case_pictures import CasePicture, draw_cases
from .curve_plots import draw_losses, draw_pseudo_dice
from .difference_plots import draw_differences
from .lookup import Lookup, focus
from .results import BenchmarkResults, Row

_LOSSES_IN_FIGURE = 3


@dataclass(frozen=True)
class Pictures:
    """By the section of the page."""

    boxes: list[Picture]
    differences: list[Picture]
    curves: list[Picture]
    cases: list[CasePicture]


def draw_pictures(results: BenchmarkResults, lookup: Lookup) -> Pictures:
    """Draw them all; cases are read from disk one at a time."""
    return Pictures(_boxes(results, lookup), _differences(results, lookup), _curves(results), draw_cases(results))


def _boxes(results: BenchmarkResults, lookup: Lookup) -> list[Picture]:
    how = (
        "Each dot is a case. Boxes span the quartiles with the median as a line, the diamond is the mean, whiskers "
        "reach the last case within 1.5 box lengths; hatched: with post-processing. Undefined scores are left out."
    )
    rows = results.rows
    overall = Picture("Scores of all cases", f"Means over classes within each case. {how}", draw_metric_boxes(rows))
    if len(lookup.classes) < 2:
        return [overall]
    return [overall, Picture("Dice by class", how, draw_class_boxes(rows, lookup.classes))]


def _differences(results: BenchmarkResults, lookup: Lookup) -> list[Picture]:
    a = focus(results)
    others = [row for row in results.rows if row.kind != "postprocessed" and row is not a]
    return [
        Picture(
            f"{a.name} minus {b.name}",
            "Each line is a case, its mean over the classes that are defined for both, sorted by the difference; "
            f"blue where {a.name} is better, orange where it is worse, grey where both are equal. "
            "Dashed: the mean; grey band: its 95 % interval. "
            "Cases where the metric is undefined for one of the two are left out.",
            draw_differences(a, b, lookup),
        )
        for b in others
    ]


def _curves(results: BenchmarkResults) -> list[Picture]:
    rows = [row for row in results.rows if row.histories]
    if not rows:
        return []
    lines = "Thin: a line for each fold; thick: their mean, as far as every fold goes."
    pictures = [
        Picture(
            "Dice during training",
            f"nnU-Net's estimate on random validation patches, once an epoch. {lines}",
            draw_pseudo_dice(rows),
        )
    ]
    for part in _parts(rows, _LOSSES_IN_FIGURE):
        caption = (
            f"Solid: training; dashed and black: validation. {lines} Losses of different methods are not comparable: "
            "each trains with its own."
        )
        pictures.append(Picture("Losses", caption, draw_losses(part)))
    return pictures


def _parts(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
