"""Two rows case by case: sorted differences."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from masksam_nnunet.inference.report.figures import png

from .case_values import case_differences
from .lookup import Lookup
from .metric_styles import STYLES
from .plots import METHOD_COLOURS, tidy
from .results import Metric, Row

BETTER, WORSE, EQUAL = METHOD_COLOURS[1], METHOD_COLOURS[2], METHOD_COLOURS[0]


def draw_differences(a: Row, b: Row, lookup: Lookup) -> bytes:
    """A panel for each metric with a - b of each case as a line from zero, and the mean with its interval."""
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    axes = figure.subplots(1, len(STYLES))
    for ax, metric in zip(axes, STYLES, strict=True):
        _panel(ax, a, b, metric, lookup)
    axes[0].set_ylabel("difference")
    tidy(list(axes))
    return png(figure)


def _panel(ax: Axes, a: Row, b: Row, metric: Metric, lookup: Lookup) -> None:
    style = STYLES[metric]
    differences = np.array(sorted(case_differences(a.scores, b.scores, metric)))
    ax.set(title=style.heading, xticks=[])
    if not len(differences):
        ax.text(0.5, 0.5, "no case where both are defined", transform=ax.transAxes, fontsize=8, ha="center")
        ax.set_yticks([])
        return
    good = differences > 0 if style.larger_is_better else differences < 0
    colours = np.where(differences == 0, EQUAL, np.where(good, BETTER, WORSE)).tolist()
    places = np.arange(len(differences))
    ax.vlines(places, 0, differences, colors=colours, linewidth=min(1.6, 160 / len(differences)))
    ax.scatter(places, differences, s=7, c=colours, linewidths=0, zorder=3)
    ax.axhline(0, color="black", lw=0.8)
    comparison = lookup.comparison(a.name, b.name, metric, None)
    mean = float(differences.mean())
    if comparison is not None and not math.isnan(comparison.difference.low):
        interval = comparison.difference
        turned = comparison.a != a.name
        ends = (-interval.high, -interval.low) if turned else (interval.low, interval.high)
        ax.axhspan(*ends, color="black", alpha=0.12, lw=0)
    ax.axhline(mean, color="black", lw=1.1, ls="dashed")
    better, worse = int(good.sum()), int((differences != 0).sum() - good.sum())
    ax.set_xlabel(f"better in {better}, worse in {worse}, of {len(differences)}")
