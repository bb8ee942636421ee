"""Box plots of the scores of cases, a box for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from masksam_nnunet.inference.report.figures import literal, png, wrapped

from .case_values import case_values
from .metric_styles import STYLES
from .plots import spread, tidy
from .results import Metric, Row
from .row_colours import Look, looks

_PANELS_IN_LINE = 4
_NAME_WIDTH = 30
_BOX_INCHES = 0.42


def draw_metric_boxes(rows: Sequence[Row]) -> bytes:
    """A panel for each metric, means over classes within cases."""
    return _draw(rows, [(metric, None, f"{style.heading} {style.arrow}") for metric, style in STYLES.items()])


def draw_class_boxes(rows: Sequence[Row], classes: Sequence[str]) -> bytes:
    """The Dice of each class in a panel of its own, all on one scale."""
    return _draw(rows, [("dice", name, wrapped(name, 24, 2)) for name in classes])


def _draw(rows: Sequence[Row], panels: Sequence[tuple[Metric, str | None, str]]) -> bytes:
    columns = min(len(panels), _PANELS_IN_LINE)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(11, lines * (len(rows) * _BOX_INCHES + 0.75)), layout="constrained")
    spread(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    colours = looks(rows)
    values = [[_defined(row, metric, class_name) for row in rows] for metric, class_name, _ in panels]
    for ax, (metric, _, title), found in zip(axes.flat, panels, values, strict=False):
        for place, row in enumerate(rows):
            _box(ax, place, found[place], colours[row.name], row.kind == "postprocessed")
        ax.set_title(title)
        ax.set_yticks(range(len(rows)), [wrapped(row.name, _NAME_WIDTH) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        alike = [part for (other, *_), group in zip(panels, values, strict=True) if other == metric for part in group]
        _scale(ax, metric, alike)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    tidy(list(axes.flat))
    return png(figure)


def _box(ax: Axes, place: int, values: list[float], look: Look, hatched: bool) -> None:
    if not values:
        ax.text(
            0.5,
            place,
            "undefined in all cases",
            transform=ax.get_yaxis_transform(),
            fontsize=7,
            ha="center",
            va="center",
        )
        return
    # The same jitter for each row: a case is found at the same height everywhere.
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
    ax.scatter(values, place + jitter, s=4, color=look.colour, alpha=0.45, linewidths=0, zorder=3)
    style: dict[str, Any] = {"color": look.colour, "linewidth": 1.1}
    drawn = ax.boxplot(
        values,
        positions=[place],
        orientation="horizontal",
        widths=0.62,
        showfliers=False,  # every case is a dot
        patch_artist=True,
        boxprops={"facecolor": "white", "edgecolor": look.colour, "hatch": "////" if hatched else None},
        medianprops={"color": "black", "linewidth": 1.6},
        whiskerprops=style,
        capprops=style,
        manage_ticks=False,
    )
    for patch in drawn["boxes"]:
        patch.set_hatch_linewidth(0.4)
    ax.plot([float(np.mean(values))], [place], marker="D", ms=4, mfc="white", mec="black", mew=0.9, ls="none", zorder=4)


def _scale(ax: Axes, metric: Metric, values: Sequence[Sequence[float]]) -> None:
    """Shares end at 1; lengths and volumes start at 0, on a symmetric logarithm where they spread over decades."""
    found = sorted(value for row in values for value in row)
    if not found:
        return
    if metric in ("dice", "surface_dice"):
        low = math.floor(found[0] * 10 - 1e-9) / 10
        ax.set_xlim(max(low, 0.0) - 0.02, 1.01)
        return
    middle = float(np.median(found))
    if found[-1] > 30 * middle > 0:
        ax.set_xscale("symlog", linthresh=middle)
        ax.set_xlabel(literal("logarithmic above the median"))
    ax.set_xlim(left=0)


def _defined(row: Row, metric: Metric, class_name: str | None) -> list[float]:
    return [value for value in case_values(row.scores, metric, class_name).values() if not math.isnan(value)]
