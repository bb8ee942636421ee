"""Panels with a slice of an image, and what is drawn over it: masks, label maps, boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..label_maps import Classes, class_mask
from .drawing import CLASS_COLOURS, LINE_STYLES

NOTE: dict[str, Any] = {
    "color": "white",
    "fontsize": 8,
    "bbox": {"facecolor": "black", "alpha": 0.55, "pad": 0.6, "linewidth": 0},
}
"""Text that can be read on any image."""
_MARGIN = 12  # pixels around the structures in a cropped view


def colour_of(classes: Classes) -> dict[str, str]:
    """The colour of each class in every picture."""
    return {name: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, name in enumerate(classes.foreground)}


def style_of(classes: Classes) -> dict[str, str]:
    """The contour of each class in pictures of cases: another where the colours repeat."""
    return {name: LINE_STYLES[i // len(CLASS_COLOURS) % len(LINE_STYLES)] for i, name in enumerate(classes.foreground)}


def grid(rows: int, columns: int, shape: Sequence[int], aspect: float) -> tuple[Figure, NDArray[Any]]:
    """A figure of panels without ticks, for images (H, W) whose pixels are ``aspect`` times as high as wide."""
    width = 10.5 / max(columns, 4)
    height = min(max(width * shape[0] * aspect / shape[1], 0.6), 5.0)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def surroundings(found: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns around all that was found in a plane (H, W), with a margin; the whole plane if nothing was."""
    if not found.any():
        return slice(0, found.shape[0]), slice(0, found.shape[1])
    window = []
    for axis, size in enumerate(found.shape):
        places = np.flatnonzero(found.any(axis=1 - axis))
        window.append(slice(max(int(places[0]) - _MARGIN, 0), min(int(places[-1]) + _MARGIN + 1, size)))
    return window[0], window[1]


def overlay(ax: Axes, labels: NDArray[np.integer[Any]], classes: Classes) -> None:
    """All classes of a label map (H, W)."""
    styles = style_of(classes)
    for name, colour in colour_of(classes).items():
        fill(ax, class_mask(labels, classes.foreground[name]).astype(float), colour, styles[name])


def fill(ax: Axes, mask: NDArray[Any], colour: str, style: str = "solid", tint: float = 0.25) -> None:
    """A tinted area with its contour, where ``mask`` (H, W) exceeds a half."""
    if not (mask > 0.5).any():
        return
    x, y, framed = _framed(mask)
    if tint:
        ax.contourf(x, y, framed, levels=[0.5, np.inf], colors=[colour], alpha=tint)
    ax.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=style)


def hatch(ax: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """A hatched area, where ``mask`` (H, W) holds."""
    if mask.any():
        x, y, framed = _framed(mask.astype(float))
        drawn = ax.contourf(x, y, framed, levels=[0.5, np.inf], colors="none", hatches=["///"])
        drawn.set_edgecolor(colour)
        drawn.set_linewidth(0)


def box(ax: Axes, edges: NDArray[np.floating[Any]], colour: str, text: str = "", style: str = "solid") -> None:
    """A box x0 y0 x1 y1 in pixels, whose text stands above it."""
    x0, y0, x1, y1 = (float(v) - 0.5 for v in edges)  # matplotlib's pixels are centred on whole numbers
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style))
    if text:
        ax.text(x0, y0, text, **NOTE | {"color": colour, "fontsize": 6}, va="bottom", ha="left", clip_on=True)


def _framed(mask: NDArray[Any]) -> tuple[NDArray[np.int_], NDArray[np.int_], NDArray[Any]]:
    """Columns, rows and values of ``mask`` with an edge of zeros, so that contours close at the picture's border."""
    framed = np.pad(mask, 1)
    return np.arange(framed.shape[1]) - 1, np.arange(framed.shape[0]) - 1, framed
