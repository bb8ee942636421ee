"""Pictures of images, masks and boxes as PNG files in memory, without pyplot's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from numpy.typing import NDArray

from ..label_maps import Classes
from .html import pieces

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#0072b2")
"""The palette of Okabe and Ito without black, which is lost on dark images."""
LINE_STYLES = ("solid", "dashed", "dotted")
"""They tell classes or methods apart where colours repeat."""
NOTE: dict[str, Any] = {
    "color": "white",
    "fontsize": 8,
    "bbox": {"facecolor": "black", "alpha": 0.55, "pad": 0.6, "linewidth": 0},
}
"""Style of text on an image."""
_DPI = 144
_MARGIN = 12  # pixels around the structures in a cropped view
_PANELS_IN_LINE = 5


# ---- parts of a figure -----------------------------------------------------------------------------------------------


def png(figure: Figure) -> bytes:
    """Save a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def literal(text: str) -> str:
    """Escape dollars, which matplotlib takes for mathematics."""
    return text.replace("$", r"\$")


def wrapped(name: str, width: int, lines: int = 3) -> str:
    """Break a name at spaces and underscores into lines of about ``width`` and cut off the rest."""
    rows = [""]
    for piece in pieces(name, width):
        if rows[-1] and len(rows[-1]) + len(piece.rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1] + "…"]
    return literal("\n".join(row.strip() for row in rows))


def colour_of(classes: Classes) -> dict[str, str]:
    """The colour of each class in every picture."""
    return {name: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, name in enumerate(classes.foreground)}


def style_of(classes: Classes) -> dict[str, str]:
    """The line style of each class's contour, which differs where the colours repeat."""
    return {name: LINE_STYLES[i // len(CLASS_COLOURS) % len(LINE_STYLES)] for i, name in enumerate(classes.foreground)}


def grid(rows: int, columns: int, shape: Sequence[int], aspect: float) -> tuple[Figure, NDArray[Any]]:
    """Make panels without ticks for images (H, W) whose pixels are ``aspect`` times as high as wide."""
    width = 10.5 / max(columns, 4)
    height = min(max(width * shape[0] * aspect / shape[1], 0.6), 5.0)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def colours_or_grey(image: NDArray[np.floating[Any]], ending: str) -> NDArray[np.floating[Any]]:
    """What to show of an image (C, D, H, W): a photograph's colours (D, H, W, 3), else its first channel (D, H, W).

    Photographs are known by the ``ending`` of their files.
    """
    photograph = ending.lower() in NaturalImage2DIO.supported_file_endings and image.shape[:2] in ((3, 1), (4, 1))
    return np.moveaxis(image[:3], 0, -1) if photograph else image[0]


def grey_window(image: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """The lowest and highest value to show."""
    low, high = np.percentile(image, (0.5, 99.8)).tolist()
    return low, high


def show(ax: Axes, image: NDArray[np.floating[Any]], window: tuple[float, float], aspect: float) -> None:
    """Draw a slice (H, W) or (H, W, 3), from the lowest to the highest value of ``window``."""
    low, high = window
    shares = ((image - low) / max(high - low, 1e-12)).clip(0, 1)
    ax.imshow(shares, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")


def surroundings(found: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns around everything found in a plane (H, W), with a margin; the whole plane if it is empty."""
    if not found.any():
        return slice(0, found.shape[0]), slice(0, found.shape[1])
    window = []
    for axis, size in enumerate(found.shape):
        places = np.flatnonzero(found.any(axis=1 - axis))
        window.append(slice(max(int(places[0]) - _MARGIN, 0), min(int(places[-1]) + _MARGIN + 1, size)))
    return window[0], window[1]


def overlay(ax: Axes, labels: NDArray[np.integer[Any]], classes: Classes) -> None:
    """Draw all classes of a label map (H, W)."""
    styles = style_of(classes)
    for name, colour in colour_of(classes).items():
        fill(ax, np.isin(labels, classes.foreground[name]).astype(float), colour, styles[name])


def fill(ax: Axes, mask: NDArray[Any], colour: str, style: str = "solid", tint: float = 0.25) -> None:
    """Draw a tinted area with its contour where ``mask`` (H, W) exceeds one half."""
    if not (mask > 0.5).any():
        return
    x, y, framed = _framed(mask)
    if tint:
        ax.contourf(x, y, framed, levels=[0.5, np.inf], colors=[colour], alpha=tint)
    ax.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=style)


def hatch(ax: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """Draw a hatched area where ``mask`` (H, W) holds."""
    if mask.any():
        x, y, framed = _framed(mask.astype(float))
        drawn = ax.contourf(x, y, framed, levels=[0.5, np.inf], colors="none", hatches=["///"])
        drawn.set_edgecolor(colour)
        drawn.set_linewidth(0)


def box(ax: Axes, edges: NDArray[np.floating[Any]], colour: str, text: str = "", style: str = "solid") -> None:
    """Draw a box (x0, y0, x1, y1) in pixels with a text above it."""
    x0, y0, x1, y1 = (float(v) - 0.5 for v in edges)  # matplotlib's pixels are centred on whole numbers
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style))
    if text:
        ax.text(x0, y0, text, **NOTE | {"color": colour, "fontsize": 6}, va="bottom", ha="left", clip_on=True)


def _framed(mask: NDArray[Any]) -> tuple[NDArray[np.int_], NDArray[np.int_], NDArray[Any]]:
    """Columns, rows and values of ``mask`` with an edge of zeros, so that contours close at the picture's border."""
    framed = np.pad(mask, 1)
    return np.arange(framed.shape[1]) - 1, np.arange(framed.shape[0]) - 1, framed


# ---- a case with its predictions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseImages:
    """One case as it was read; all arrays are (D, H, W)."""

    image: NDArray[np.floating[Any]]  # or (D, H, W, 3), see colours_or_grey
    spacing: tuple[float, ...]  # millimetres along (D, H, W)
    truth: NDArray[np.integer[Any]]  # label values
    predictions: Mapping[str, NDArray[np.integer[Any]]]  # label values by method
    judged: str  # the method whose errors choose a slice
    notes: Mapping[str, str] = field(default_factory=dict)  # what to write below a method's name


def draw_case(images: CaseImages, classes: Classes) -> bytes:
    """Draw one or two slices of a case: the image alone, with the truth, and with each method's prediction."""
    slices = choose_slices(images, classes)
    maps = [images.truth, *images.predictions.values()]
    view = surroundings(np.any([(labels > 0).any(axis=0) for labels in maps], axis=0))
    window = grey_window(images.image)
    panels: list[tuple[str, NDArray[np.integer[Any]] | None]] = [("image", None), ("truth", images.truth)]
    panels += list(images.predictions.items())
    lines = math.ceil(len(panels) / _PANELS_IN_LINE)
    columns = math.ceil(len(panels) / lines)
    aspect = images.spacing[1] / images.spacing[2]
    figure, axes = grid(len(slices) * lines, columns, images.image[0][view].shape[:2], aspect)
    for row, (index, reason) in enumerate(slices):
        panes = axes[row * lines : (row + 1) * lines]
        for ax, (title, labels) in zip(panes.flat, panels, strict=False):
            show(ax, images.image[index][view], window, aspect)
            if labels is not None:
                overlay(ax, labels[index][view], classes)
            if row == 0 or lines > 1:
                note = images.notes.get(title)
                ax.set_title(wrapped(title, 26) + (f"\n{literal(note)}" if note else ""), fontsize=9)
        panes[0, 0].set_ylabel(f"slice {index}\n{wrapped(reason, 26)}", fontsize=8)
    return png(figure)


def choose_slices(images: CaseImages, classes: Classes) -> list[tuple[int, str]]:
    """The slice with most labelled voxels, and another one where the judged method errs most, each with its reason."""
    foreground = classes.foreground.values()
    truth, judged = images.truth, images.predictions[images.judged]
    size = np.sum([np.isin(truth, values).sum((1, 2)) for values in foreground], axis=0)
    wrong = np.sum([(np.isin(judged, v) ^ np.isin(truth, v)).sum((1, 2)) for v in foreground], axis=0)
    largest = int(np.argmax(size))
    wrong[largest] = 0
    chosen = [(largest, "most labelled voxels")]
    if wrong.any():
        chosen.append((int(np.argmax(wrong)), "most errors"))
    return chosen
