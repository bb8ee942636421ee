"""Pictures of one slice: what the model says of it, and what each of its queries does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..label_maps import Classes
from ..report.figures import (
    NOTE,
    box,
    colour_of,
    fill,
    grid,
    hatch,
    overlay,
    png,
    style_of,
    surroundings,
    wrapped,
)
from .facts import QueryFacts, SliceFacts
from .volume import picture_edges
from .windows import SliceQueries

NEUTRAL = "#cccccc"
"""Of queries that chose background or "no object"; ignored voxels are of this colour too."""
NOT_NEEDED = "dotted"
"""Line style of "no object", which has no tint."""
UNCERTAINTY_MAP = "cividis"  # rises evenly in brightness, for every kind of colour vision
_IN_LINE = 4
_PLACES = {
    "top": (0.5, 0.99, "center", "top"),
    "bottom": (0.5, 0.01, "center", "bottom"),
    "left": (0.01, 0.5, "left", "center"),
    "right": (0.99, 0.5, "right", "center"),
}


@dataclass(frozen=True)
class SliceImages:
    """One slice on the network's grid, all (H, W).

    Attributes:
        image: first channel.
        label: label values, or None.
        result: label values.
        entropy: in bits.
        disagreement: in bits, or None.
        aspect: height of a pixel over its width.
        window: (low, high) of the grey values, the same for all slices.
        directions: where rising (row, column) lead, or None.
    """

    image: NDArray[np.float32]
    label: NDArray[np.integer[Any]] | None
    result: NDArray[np.integer[Any]]
    entropy: NDArray[np.float32]
    disagreement: NDArray[np.float32] | None
    aspect: float
    window: tuple[float, float]
    directions: tuple[str, str] | None


def draw_overview(images: SliceImages, queries: SliceQueries, classes: Classes) -> bytes:
    """The slice, its label, the result, and the uncertainty, side by side."""
    maps = {"uncertainty (entropy)": images.entropy}
    if images.disagreement is not None:
        maps["disagreement of folds"] = images.disagreement
    titles = ["image", *(["label"] if images.label is not None else []), "result"]
    figure, axes = grid(1, len(titles) + len(maps), images.image.shape, images.aspect)
    figure.set_layout_engine("compressed")  # panels of one size beside the colour bar
    bits_shown = Normalize(0, most_bits(classes))  # the same in all pictures, so that they can be compared
    for ax, title in zip(axes[0], titles, strict=False):
        _show(ax, images, images.image)
        ax.set_title(title, fontsize=10)
        if title == "label" and images.label is not None:
            overlay(ax, images.label, classes)
            if classes.ignore_label is not None:
                hatch(ax, images.label == classes.ignore_label, NEUTRAL)
        if title == "result":
            overlay(ax, images.result, classes)
    _letters(axes[0, 0], images.directions)
    _outline(axes[0, 0], queries, images.image.shape)
    for ax, (title, bits) in zip(axes[0, len(titles) :], maps.items(), strict=True):
        ax.imshow(bits, cmap=UNCERTAINTY_MAP, norm=bits_shown, aspect=images.aspect, interpolation="nearest")
        for values in classes.foreground.values():
            inside = np.isin(images.result, values)
            if inside.any() and not inside.all():
                ax.contour(inside.astype(float), levels=[0.5], colors="white", linewidths=0.7)
        ax.set_title(title, fontsize=10)
    extend = "max" if len(classes.heads) > 4 and not classes.has_regions else "neither"
    scale = ScalarMappable(bits_shown, UNCERTAINTY_MAP)
    bar = figure.colorbar(scale, ax=axes[0, len(titles) :].tolist(), fraction=0.05, pad=0.02, extend=extend)
    bar.set_label("bits", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return png(figure)


def draw_queries(images: SliceImages, queries: SliceQueries, facts: SliceFacts, classes: Classes) -> bytes:
    """For each shown query two panels: its draft, mask and box, and below it the final mask."""
    shown = [query for query in facts.queries if query.shown]
    columns = min(_IN_LINE, len(shown))
    bands = math.ceil(len(shown) / columns)
    rows, cols = queries_view(images, queries, facts)  # of the window
    at = (queries.corner[1], queries.corner[2])
    part = images.image[rows.start + at[0] : rows.stop + at[0], cols.start + at[1] : cols.stop + at[1]]
    figure, axes = grid(2 * bands, columns, part.shape, images.aspect)
    figure.set_layout_engine("constrained", h_pad=0.12)  # titles of two lines are cut off with less
    for ax in axes.flat:
        ax.set_visible(False)
    for place, query in enumerate(shown):
        above, below = (axes[2 * (place // columns) + row, place % columns] for row in (0, 1))
        colour, style = _look(query, classes)
        for ax in (above, below):
            ax.set_visible(True)
            _show(ax, images, part)
        n = query.number - 1
        draft, mask = (masks[n][rows, cols] for masks in (queries.drafts, queries.masks))
        _mask(above, draft, colour, style, images.aspect)
        box(above, queries.boxes[n] - np.array([cols.start, rows.start] * 2), colour, style=style)
        above.set_title(_title(query), fontsize=8)
        _mask(below, mask, colour, style, images.aspect)
        if not query.draft_pixels:
            _remark(above, "draft mask nowhere above one half")
        if not query.contributes:
            _remark(below, "adds nothing to the foreground")
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("draft: mask and box", fontsize=8)
        axes[2 * band + 1, 0].set_ylabel("final mask", fontsize=8)
    return png(figure)


def queries_view(images: SliceImages, queries: SliceQueries, facts: SliceFacts) -> tuple[slice, slice]:
    """Rows and columns of the window that pictures of its queries show: all of foreground there is, and around it.

    That is the result, the label, and masks and boxes of the queries that contribute.
    """
    found = np.zeros(queries.size[1:], bool)
    _, row, column = queries.corner
    part_rows, part_columns = queries.inside
    inside = (
        slice(part_rows.start + row, part_rows.stop + row),
        slice(part_columns.start + column, part_columns.stop + column),
    )
    for labels in (images.result, images.label):
        if labels is not None:
            found[queries.inside] |= labels[inside] > 0
    for query in facts.queries:
        if query.contributes:
            found |= queries.masks[query.number - 1] > 0.5
            x0, y0, x1, y1 = (max(0, round(float(edge))) for edge in queries.boxes[query.number - 1])
            found[y0:y1, x0:x1] = True
    rows, cols = surroundings(found[queries.inside])
    return (
        slice(rows.start + part_rows.start, rows.stop + part_rows.start),
        slice(cols.start + part_columns.start, cols.stop + part_columns.start),
    )


def most_bits(classes: Classes) -> float:
    """The end of the scale of uncertainty: the most there can be, at most that of four classes."""
    return 1.0 if classes.has_regions else min(2.0, math.log2(len(classes.heads)))


def _title(query: QueryFacts) -> str:
    named = f"{wrapped(query.class_name, 22, lines=2)} {query.probability:.2f}"
    nothing, adds = f"no object {query.no_object:.2f}", f"adds {100 * query.share:.0f} %"
    if not query.kept:
        named, nothing = nothing, named
    return f"query {query.number}: {named}\n{nothing}, {adds}"


def _look(query: QueryFacts, classes: Classes) -> tuple[str, str]:
    if not query.kept:
        return NEUTRAL, NOT_NEEDED
    if query.class_name not in classes.foreground:
        return NEUTRAL, "solid"
    return colour_of(classes)[query.class_name], style_of(classes)[query.class_name]


def _mask(ax: Axes, mask: NDArray[np.float32], colour: str, style: str, aspect: float) -> None:
    """A tint as strong as the probability (H, W), a line at one half; hatched where colour alone would be lost."""
    if style == NOT_NEEDED:
        fill(ax, mask, colour, style, tint=0)
        return
    tint = np.empty((*mask.shape, 4))
    tint[..., :3], tint[..., 3] = to_rgb(colour), 0.55 * mask
    ax.imshow(tint, aspect=aspect, interpolation="nearest")
    fill(ax, mask, colour, style, tint=0)
    if colour == NEUTRAL:
        hatch(ax, mask > 0.5, colour)


def _remark(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.03, text, transform=ax.transAxes, **NOTE, ha="center")


def _show(ax: Axes, images: SliceImages, image: NDArray[np.float32]) -> None:
    low, high = images.window
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=images.aspect, interpolation="nearest")
    ax.autoscale(False)  # boxes and contours may leave the picture, which must not grow with them


def _letters(ax: Axes, directions: Sequence[str] | None) -> None:
    for edge, letter in picture_edges(directions).items() if directions else ():
        x, y, horizontal, vertical = _PLACES[edge]
        ax.text(x, y, letter, transform=ax.transAxes, **NOTE, ha=horizontal, va=vertical)


def _outline(ax: Axes, queries: SliceQueries, shape: Sequence[int]) -> None:
    """The window, where it is not the whole slice."""
    rows, columns = queries.inside
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) == tuple(shape):
        return
    corner = (queries.corner[2] + columns.start - 0.5, queries.corner[1] + rows.start - 0.5)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1, linestyle="dashed"))
