"""Pictures of cases and of the demo's trainings, as PNG files in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..explain.inside import InsideView
from ..history import History
from ..label_maps import Classes, class_mask
from .drawing import METHOD_COLOURS, literal, png, tidy, wrapped
from .panels import NOTE, box, colour_of, fill, grid, overlay, surroundings

_PANELS_IN_LINE = 5


@dataclass(frozen=True)
class CaseImages:
    """One case as it was read, all arrays (D, H, W).

    Attributes:
        case: its name.
        image: the first channel.
        spacing: millimetres along (D, H, W).
        truth: label values.
        predictions: label values by method.
        judged: the method whose errors choose a slice; by default the last.
        notes: what to write above a method's column besides its name.
    """

    case: str
    image: NDArray[np.float32]
    spacing: tuple[float, float, float]
    truth: NDArray[np.integer[Any]]
    predictions: Mapping[str, NDArray[np.integer[Any]]]
    judged: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def draw_curves(histories: Mapping[str, History]) -> bytes:
    """Pseudo Dice of all methods over training time, and each method's losses in a panel of its own."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(histories), squeeze=False)[0]
    for (name, history), colour in zip(histories.items(), METHOD_COLOURS, strict=False):
        axes[0].plot(history.seconds, history.pseudo_dice, "o-", color=colour, label=literal(name), ms=3, lw=1.5)
    axes[0].set(title="Dice on validation patches", xlabel="seconds", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    for ax, (name, history), colour in zip(axes[1:], histories.items(), METHOD_COLOURS, strict=False):
        ax.plot(history.seconds, history.train_loss, "o-", color=colour, label="training", ms=3, lw=1.5)
        ax.plot(history.seconds, history.val_loss, "s--", color=colour, alpha=0.6, label="validation", ms=3, lw=1.2)
        ax.set(title=literal(f"Losses of {name}"), xlabel="seconds")
        ax.legend(frameon=False, fontsize=8)
    tidy(axes)
    return png(figure)


def draw_case(images: CaseImages, classes: Classes) -> bytes:
    """Two slices of a case: the image alone, with the truth, and with each method's prediction."""
    slices = choose_slices(images, classes)
    maps = [images.truth, *images.predictions.values()]
    view = surroundings(np.any([(labels > 0).any(axis=0) for labels in maps], axis=0))
    low, high = np.percentile(images.image, (0.5, 99.8))
    panels: list[tuple[str, NDArray[np.integer[Any]] | None]] = [("image", None), ("truth", images.truth)]
    panels += list(images.predictions.items())
    lines = math.ceil(len(panels) / _PANELS_IN_LINE)
    columns = math.ceil(len(panels) / lines)
    aspect = images.spacing[1] / images.spacing[2]
    figure, axes = grid(len(slices) * lines, columns, images.image[0][view].shape, aspect)
    for row, (index, reason) in enumerate(slices):
        panes = axes[row * lines : (row + 1) * lines]
        for ax, (title, labels) in zip(panes.flat, panels, strict=False):
            ax.imshow(images.image[index][view], cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if labels is not None:
                overlay(ax, labels[index][view], classes)
            if row == 0 or lines > 1:
                note = images.notes.get(title)
                ax.set_title(wrapped(title, 26) + (f"\n{literal(note)}" if note else ""), fontsize=9)
        panes[0, 0].set_ylabel(f"slice {index}\n{wrapped(reason, 26)}", fontsize=8)
    return png(figure)


def draw_inside(view: InsideView, classes: Classes) -> bytes:
    """Three slices of a patch: truth, auxiliary boxes and auxiliary masks of the queries that found a class.

    Queries that chose background or "no object" are left out.
    """
    colours = colour_of(classes)
    heads = classes.heads
    low, high = np.percentile(view.image, (0.5, 99.8))
    rows = _slices_with_objects(view, heads)
    figure, axes = grid(len(rows), 3, view.image.shape[1:], view.aspect)
    for row, index in enumerate(rows):
        for ax in axes[row]:
            ax.imshow(view.image[index], cmap="gray", vmin=low, vmax=high, aspect=view.aspect)
        overlay(axes[row, 0], view.truth[index], classes)
        queries = [q for q in np.flatnonzero(view.kept[index]) if heads[view.classes[index, q]] in colours]
        for query in queries:
            name = heads[view.classes[index, query]]
            label = f"{literal(name)} {view.confidence[index, query]:.2f}"
            box(axes[row, 1], view.boxes[index, query], colours[name], label)
            fill(axes[row, 2], view.masks[index, query], colours[name])
        if not queries:
            for ax in axes[row, 1:]:
                ax.text(0.5, 0.04, "no query found a class", transform=ax.transAxes, **NOTE, ha="center")
        axes[row, 0].set_ylabel(f"slice {index} of the patch", fontsize=8)
        for ax in axes[row]:  # boxes may leave the patch: the picture must not grow with them
            ax.set_xlim(-0.5, view.image.shape[2] - 0.5)
            ax.set_ylim(view.image.shape[1] - 0.5, -0.5)
    for ax, title in zip(axes[0], ("truth", "auxiliary boxes", "auxiliary masks"), strict=True):
        ax.set_title(title, fontsize=10)
    return png(figure)


def choose_slices(images: CaseImages, classes: Classes) -> list[tuple[int, str]]:
    """The slice with most labelled voxels, and the one where the judged method errs most; one if they are the same."""
    foreground = [class_mask(images.truth, values) for values in classes.foreground.values()]
    size = np.sum([mask.sum(axis=(1, 2)) for mask in foreground], axis=0)
    judged = images.judged or list(images.predictions)[-1]
    labels = images.predictions[judged]
    wrong = np.sum(
        [(class_mask(labels, v) ^ class_mask(images.truth, v)).sum((1, 2)) for v in classes.foreground.values()], 0
    )
    largest = int(np.argmax(size))
    wrong[largest] = 0
    chosen = [(largest, "most labelled voxels")]
    if wrong.any():
        chosen.append((int(np.argmax(wrong)), f"most errors of {judged}"))
    return chosen


def _slices_with_objects(view: InsideView, heads: Sequence[str], count: int = 3) -> list[int]:
    """Slices spread over those where a query found a class other than background; else the middle one."""
    found = view.kept & (np.array(heads)[view.classes] != "background")
    candidates = np.flatnonzero(found.any(axis=1))
    if not len(candidates):
        return [view.image.shape[0] // 2]
    places = np.linspace(0, len(candidates) - 1, count + 2)[1:-1]
    return sorted({int(candidates[round(place)]) for place in places})
