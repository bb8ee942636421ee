"""Learning curves of all folds: a thin line for each, the mean thick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from masksam_nnunet.inference.history import History
from masksam_nnunet.inference.report.figures import png, wrapped

from .plots import spread, tidy
from .results import Row
from .row_colours import looks

_Values = Callable[[History], Sequence[float]]
_POINTS = 200


def draw_pseudo_dice(rows: Sequence[Row]) -> bytes:
    """Of all ``rows`` over hours and over epochs, on one scale. Each row must have a history."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = looks(rows)
    for ax, in_hours in zip(axes, (True, False), strict=True):
        for row in rows:
            look = colours[row.name]
            label = wrapped(row.name, 44, 2)
            _curves(ax, row, lambda h: h.pseudo_dice, in_hours, look.colour, look.line, label)
        ax.set(title="Pseudo-Dice on validation patches", ylim=(0, 1))
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    tidy(list(axes))
    return png(figure)


def draw_losses(rows: Sequence[Row]) -> bytes:
    """Two panels for each row, over hours and over epochs: training loss solid, validation loss dashed."""
    figure = Figure(figsize=(11, 2.8 * len(rows)), layout="constrained")
    spread(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    colours = looks(rows)
    for line, row in zip(axes, rows, strict=True):
        for ax, in_hours in zip(line, (True, False), strict=True):
            colour = colours[row.name].colour
            _curves(ax, row, lambda h: h.train_loss, in_hours, colour, "solid", "training")
            _curves(ax, row, lambda h: h.val_loss, in_hours, "black", "dashed", "validation")
            ax.set_title(f"Losses of {wrapped(row.name, 60, 1)}")
        line[1].legend(frameon=False, fontsize=8)
    tidy(list(axes.flat))
    return png(figure)


def _curves(ax: Axes, row: Row, values: _Values, in_hours: bool, colour: str, line: str, label: str) -> None:
    ax.set_xlabel("hours of training" if in_hours else "epochs")
    folds = [_points(history, values, in_hours) for history in row.histories.values()]
    folds = [(x, y) for x, y in folds if len(x)]
    for x, y in folds:
        ax.plot(x, y, color=colour, ls=line, lw=0.6, alpha=0.45, marker="." if len(x) == 1 else None)
    if not folds:
        return
    # Only where every fold has been: else the mean would jump where one ends.
    start, end = max(x[0] for x, _ in folds), min(x[-1] for x, _ in folds)
    if start > end:
        start = end = folds[0][0][0]
    grid = np.linspace(start, end, _POINTS) if end > start else np.array([start])
    mean = np.mean([np.interp(grid, x, y) for x, y in folds], axis=0)
    ax.plot(grid, mean, color=colour, ls=line, lw=2.2, label=label, marker="o" if len(grid) == 1 else None)


def _points(history: History, values: _Values, in_hours: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y = np.asarray(values(history), dtype=float)
    x = np.asarray(history.seconds, dtype=float) / 3600 if in_hours else np.arange(1, len(y) + 1, dtype=float)
    defined = np.isfinite(y)
    return x[defined], y[defined]
