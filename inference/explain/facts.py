"""The numbers that a page states about a slice and its queries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..label_maps import Classes, class_mask
from .windows import SliceQueries

SHOWN = 12
"""Most queries that are drawn for a slice."""
LEAST_SHARE = 0.01
"""From here on a query contributes."""


@dataclass(frozen=True)
class QueryFacts:
    """One query in one slice of one window.

    Attributes:
        number: from 1.
        class_name: its likeliest class that is not "no object".
        probability: of that class.
        no_object: probability of "no object".
        kept: whether the class is likelier than "no object".
        box: x0 y0 x1 y1 in pixels of the network's grid.
        draft_pixels: of the auxiliary mask, above one half, in the volume.
        mask_pixels: of the final mask.
        draft_iou: of auxiliary and final mask; NaN where both are empty.
        label_iou: of the final mask and its class in the label; NaN without a label, or where both are empty.
        share: of the slice's foreground score.
        contributes: whether that is :data:`LEAST_SHARE` or more.
        shown: whether it is drawn.
    """

    number: int
    class_name: str
    probability: float
    no_object: float
    kept: bool
    box: tuple[float, float, float, float]
    draft_pixels: int
    mask_pixels: int
    draft_iou: float
    label_iou: float
    share: float
    contributes: bool
    shown: bool


@dataclass(frozen=True)
class SliceFacts:
    """One slice.

    Attributes:
        source: its index in the source, from 0.
        network: on the network's grid.
        window: number of its window, from 1, and how many there are.
        corner: (d, h, w) of the window's first voxel on the network's grid.
        size: (D, H, W) of the window.
        off_centre: slices of the network's grid between the slice and the window's centre.
        foreground: voxels of the result, of any class, in the network's slice.
        mean_entropy: over the network's slice, in bits.
        queries: those with the largest share first.
    """

    source: int
    network: int
    window: tuple[int, int]
    corner: tuple[int, int, int]
    size: tuple[int, int, int]
    off_centre: float
    foreground: int
    mean_entropy: float
    queries: tuple[QueryFacts, ...]

    @property
    def shown(self) -> int:
        """How many queries are drawn."""
        return sum(query.shown for query in self.queries)

    @property
    def contributing(self) -> int:
        """How many queries contribute."""
        return sum(query.contributes for query in self.queries)


def slice_facts(
    source: int,
    queries: SliceQueries,
    label: NDArray[np.integer[Any]] | None,
    result: NDArray[np.integer[Any]],
    entropy: NDArray[np.floating[Any]],
    classes: Classes,
    most: int = SHOWN,
) -> SliceFacts:
    """State a slice in numbers.

    Args:
        source: its index in the source.
        queries: of its window.
        label: (H, W) on the network's grid, if there is one.
        result: (H, W).
        entropy: (H, W).
        classes: of the model.
        most: how many queries are drawn at most.
    """
    shares = queries.shares(classes.has_regions)
    order = sorted(range(len(shares)), key=lambda n: (-round(float(shares[n]), 6), queries.probabilities[n, -1], n))
    drawn = set(order[:most])
    middle = queries.corner[0] + (queries.size[0] - 1) / 2
    return SliceFacts(
        source=source,
        network=queries.index,
        window=(queries.window, queries.windows),
        corner=queries.corner,
        size=queries.size,
        off_centre=abs(queries.index - middle),
        foreground=int(np.count_nonzero(result > 0)),
        mean_entropy=float(entropy.mean()),
        queries=tuple(_query(queries, n, float(shares[n]), n in drawn, label, classes) for n in order),
    )


def _query(
    queries: SliceQueries,
    n: int,
    share: float,
    shown: bool,
    label: NDArray[np.integer[Any]] | None,
    classes: Classes,
) -> QueryFacts:
    probabilities = queries.probabilities[n]
    best = int(probabilities[:-1].argmax())
    name = classes.heads[best]
    draft, mask = (masks[n][queries.inside] > 0.5 for masks in (queries.drafts, queries.masks))
    x0, y0, x1, y1 = (float(edge) for edge in queries.volume_boxes[n])
    return QueryFacts(
        number=n + 1,
        class_name=name,
        probability=float(probabilities[best]),
        no_object=float(probabilities[-1]),
        kept=bool(probabilities[best] > probabilities[-1]),
        box=(x0, y0, x1, y1),
        draft_pixels=int(np.count_nonzero(draft)),
        mask_pixels=int(np.count_nonzero(mask)),
        draft_iou=_iou(draft, mask),
        label_iou=math.nan if label is None else _label_iou(mask, queries, label, name, classes),
        share=share,
        contributes=share >= LEAST_SHARE,
        shown=shown,
    )


def _label_iou(
    mask: NDArray[np.bool_], queries: SliceQueries, label: NDArray[np.integer[Any]], name: str, classes: Classes
) -> float:
    """Within the window; ignored voxels do not count."""
    rows, columns = queries.inside
    _, row, column = queries.corner
    here = label[row + rows.start : row + rows.stop, column + columns.start : column + columns.stop]
    wanted = class_mask(here, classes.foreground.get(name, (-1, 0)))  # background: also what nnU-Net cut off
    counted = here != classes.ignore_label
    return _iou(mask & counted, wanted & counted)


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else math.nan
