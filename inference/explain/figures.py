"""Pictures of one slice: what the model says of it, and what each of its queries does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
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
    grey_window,
    grid,
    hatch,
    overlay,
    png,
    show,
    style_of,
    surroundings,
    wrapped,
)
from .inside import SliceQueries

_NEUTRAL = "#cccccc"  # of queries that chose background or "no object", and of ignored voxels
_NO_OBJECT = "dotted"  # line style of "no object", which has no tint
_UNCERTAINTY_MAP = "cividis"  # rises evenly in brightness, for every kind of colour vision
_IN_LINE = 4
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))


@dataclass(frozen=True)
class SliceImages:
    """One slice (H, W) on the network's grid."""

    image: NDArray[np.floating[Any]]  # or (H, W, 3), see colours_or_grey
    label: NDArray[np.integer[Any]] | None  # label values
    result: NDArray[np.integer[Any]]  # not 0 where the model finds something
    aspect: float  # height of a pixel over its width
    window: tuple[float, float]  # lowest and highest grey value shown

    @classmethod
    def of(
        cls,
        index: int,
        image: NDArray[np.floating[Any]],
        label: NDArray[np.integer[Any]] | None,
        result: NDArray[np.integer[Any]],
        spacing: Sequence[float],
    ) -> SliceImages:
        """Take a slice of volumes (D, H, W), the image perhaps (D, H, W, 3); all slices share one grey window."""
        here = None if label is None else label[index]
        return cls(image[index], here, result[index], spacing[-2] / spacing[-1], grey_window(image))


def draw_overview(
    images: SliceImages,
    queries: SliceQueries,
    classes: Classes,
    maps: Mapping[str, NDArray[np.float32]],
    directions: Sequence[str] | None,
) -> bytes:
    """Draw the slice, its label, the result, and the uncertainty, side by side.

    Args:
        images: with label values as the result.
        queries: of the slice; their window is framed.
        classes: of the model.
        maps: uncertainties (H, W) in bits by title.
        directions: where rising (row, column) lead, or None.
    """
    panels: dict[str, NDArray[Any] | None] = {"image": None}
    if images.label is not None:
        panels["label"] = images.label
    panels["result"] = images.result
    figure, axes = grid(1, len(panels) + len(maps), images.image.shape[:2], images.aspect)
    figure.set_layout_engine("compressed")  # panels of one size beside the colour bar
    for ax, (title, values) in zip(axes[0], panels.items(), strict=False):
        _show(ax, images, images.image)
        ax.set_title(title, fontsize=10)
        if values is not None:
            overlay(ax, values, classes)
            if title == "label" and classes.ignore_label is not None:
                hatch(ax, values == classes.ignore_label, _NEUTRAL)
    if directions is not None:
        down, right = directions
        for x, y, letter in ((0.5, 0, down), (0.5, 1, _OPPOSITE[down]), (1, 0.5, right), (0, 0.5, _OPPOSITE[right])):
            inwards = ((0.5 - x) * 14, (0.5 - y) * 14)  # points
            axes[0, 0].annotate(
                letter, (x, y), inwards, "axes fraction", "offset points", **NOTE, ha="center", va="center"
            )
    rows, columns = queries.plane
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) != images.image.shape[:2]:  # frame the window
        corner = (columns.start - 0.5, rows.start - 0.5)
        frame = Rectangle(corner, width, height, fill=False, edgecolor="white", linestyle="dashed")
        axes[0, 0].add_patch(frame)
    most = 1.0 if classes.has_regions else min(2.0, math.log2(len(classes.heads)))
    bits_shown = Normalize(0, most)  # the same in all pictures, so that they can be compared
    map_axes = axes[0, len(panels) :].tolist()
    for ax, (title, bits) in zip(map_axes, maps.items(), strict=True):
        ax.imshow(bits, cmap=_UNCERTAINTY_MAP, norm=bits_shown, aspect=images.aspect, interpolation="nearest")
        for labels in classes.foreground.values():
            found = np.isin(images.result, labels)
            if found.any() and not found.all():
                ax.contour(found.astype(float), levels=[0.5], colors="white", linewidths=0.7)
        ax.set_title(title, fontsize=10)
    extend = "max" if len(classes.heads) > 4 and not classes.has_regions else "neither"
    scale = ScalarMappable(bits_shown, _UNCERTAINTY_MAP)
    bar = figure.colorbar(scale, ax=map_axes, fraction=0.05, pad=0.02, extend=extend)
    bar.set_label("bits", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return png(figure)


def draw_queries(
    images: SliceImages, queries: SliceQueries, table: pd.DataFrame, classes: Classes
) -> tuple[bytes, str]:
    """Draw two panels for each shown query: its draft with mask and box, and below it the final mask.

    Returns:
        The picture and its caption.
    """
    shown = list(table[table.shown].itertuples())
    columns = min(_IN_LINE, len(shown))
    bands = math.ceil(len(shown) / columns)
    rows, cols = _query_view(images, queries, table)  # of the window
    top, left = queries.corner[1:]
    part = images.image[rows.start + top : rows.stop + top, cols.start + left : cols.stop + left]
    figure, axes = grid(2 * bands, columns, part.shape[:2], images.aspect)
    figure.set_layout_engine("constrained", h_pad=0.12)  # titles of two lines are cut off with less
    for ax in axes.flat:
        ax.set_visible(False)
    for place, query in enumerate(shown):
        above, below = (axes[2 * (place // columns) + row, place % columns] for row in (0, 1))
        colour, style, n = _NEUTRAL, _NO_OBJECT, query.number - 1
        if query.kept:
            colour = colour_of(classes).get(query.class_name, _NEUTRAL)
            style = style_of(classes).get(query.class_name, "solid")
        for ax, mask in ((above, queries.drafts[n]), (below, queries.masks[n])):
            ax.set_visible(True)
            _show(ax, images, part)
            _draw_mask(ax, mask[rows, cols], colour, style, images.aspect)
        box(above, queries.boxes[n] - np.array([cols.start, rows.start] * 2), colour, style=style)
        named = f"{wrapped(query.class_name, 22, lines=2)} {query.probability:.2f}"
        nothing = f"no object {query.no_object:.2f}"
        first, second = (named, nothing) if query.kept else (nothing, named)
        above.set_title(f"query {query.number}: {first}\n{second}, adds {100 * query.share:.0f} %", fontsize=8)
        if not query.draft_pixels:
            above.text(0.5, 0.03, "draft mask nowhere above one half", transform=above.transAxes, **NOTE, ha="center")
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("draft: mask and box", fontsize=8)
        axes[2 * band + 1, 0].set_ylabel("final mask", fontsize=8)
    caption = (
        f"{len(shown)} of {len(table)} queries shown, those that add most first. Above each draft: class with "
        "probability, probability of “no object”, and share."
    )
    if part.shape != images.image.shape:
        caption += f" Cut to rows {rows.start + top} to {rows.stop + top - 1}, "
        caption += f"columns {cols.start + left} to {cols.stop + left - 1} of the network's slice."
    return png(figure), caption


def _query_view(images: SliceImages, queries: SliceQueries, table: pd.DataFrame) -> tuple[slice, slice]:
    """Rows and columns of the window around the result, the label, and masks and boxes of contributing queries."""
    found = np.zeros(queries.size[1:], bool)
    for labels in (images.result, images.label):
        if labels is not None:
            found[queries.inside] |= labels[queries.plane] > 0
    for number in table.number[table.contributes]:
        found |= queries.masks[number - 1] > 0.5
        x0, y0, x1, y1 = (max(0, round(float(edge))) for edge in queries.boxes[number - 1])
        found[y0:y1, x0:x1] = True
    rows, columns = (
        slice(part.start + inside.start, part.stop + inside.start)
        for part, inside in zip(surroundings(found[queries.inside]), queries.inside, strict=True)
    )
    return rows, columns


def _draw_mask(ax: Axes, mask: NDArray[np.float32], colour: str, style: str, aspect: float) -> None:
    """A tint as strong as the probability (H, W), a line at one half; hatched where colour alone would be lost."""
    if style != _NO_OBJECT or colour != _NEUTRAL:
        tint = np.empty((*mask.shape, 4))
        tint[..., :3], tint[..., 3] = to_rgb(colour), 0.55 * mask
        ax.imshow(tint, aspect=aspect, interpolation="nearest")
        if colour == _NEUTRAL:
            hatch(ax, mask > 0.5, colour)
    fill(ax, mask, colour, style, tint=0)


def _show(ax: Axes, images: SliceImages, image: NDArray[np.floating[Any]]) -> None:
    show(ax, image, images.window, images.aspect)
    ax.autoscale(False)  # boxes and contours may leave the picture, which must not grow with them
