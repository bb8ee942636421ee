"""The page: everything inline, nothing fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report.html import Picture, environment, number, plain
from .facts import LEAST_SHARE, SliceFacts

_AXES = {"i": "first", "j": "second", "k": "third"}
_WORDS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}


@dataclass(frozen=True)
class Overlay:
    """A file that a viewer opens."""

    file: str
    shows: str


@dataclass(frozen=True)
class SlicePage:
    """One slice: its numbers and its pictures."""

    facts: SliceFacts
    overview: Picture
    queries: Picture


@dataclass(frozen=True)
class Explanation:
    """All that the page says.

    Attributes:
        case: its name.
        origin: where its files were found.
        files: the image's.
        label: the label's file, or None.
        seen: whether the folds were trained on it, in words; None where that is not known.
        dataset: of the model.
        trainer: its class.
        plans: their name.
        configuration: nnU-Net's.
        folds: that predicted.
        checkpoint: file name.
        backbone: of the network.
        num_queries: N.
        regions: whether the classes are regions.
        ignored: whether the dataset has an ignore label.
        mirrored: whether mirrors were averaged.
        windows: in the volume.
        grid: (D, H, W) of the network.
        spacing: of that grid, in mm.
        source_slices: how many slices the source has along the network's D.
        slice_axis: the source's voxel axis along D: i, j or k.
        directions: where rising indices along (D, H, W) lead, or None.
        colours: of each class.
        styles: of each class's contour.
        slices: in rising order.
        chosen: whether we chose them.
        overlays: in the folder.
        seconds: from reading to the last picture.
        versions: of the software.
    """

    case: str
    origin: str
    files: Sequence[str]
    label: str | None
    seen: str | None
    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: Sequence[str]
    checkpoint: str
    backbone: str
    num_queries: int
    regions: bool
    ignored: bool
    mirrored: bool
    windows: int
    grid: tuple[int, int, int]
    spacing: tuple[float, float, float]
    source_slices: int
    slice_axis: str
    directions: tuple[str, str, str] | None
    colours: Mapping[str, str]
    styles: Mapping[str, str]
    slices: Sequence[SlicePage]
    chosen: bool
    overlays: Sequence[Overlay]
    seconds: float
    versions: Mapping[str, str]


def render(explanation: Explanation) -> str:
    """The HTML page."""
    share, score = (lambda value: f"{100 * value:.0f} %"), number(2)
    return (
        environment()
        .get_template("explain.html.j2")
        .render(
            e=explanation,
            axis_word=_AXES[explanation.slice_axis],
            orientation=orientation_words(explanation.directions),
            share=share,
            score=score,
            least=share(LEAST_SHARE),
            spacing=" × ".join(f"{step:g}" for step in explanation.spacing),
        )
    )


def orientation_words(directions: Sequence[str] | None) -> str | None:
    """How the pictures lie in the body, for a reader; None where the image does not say."""
    if directions is None:
        return None
    depth, rows, columns = (_WORDS[letter] for letter in directions)
    return f"down is {rows}, rightwards is {columns}, and slices are counted towards {depth}"


def to_json(explanation: Explanation, files: Sequence[str]) -> dict[str, Any]:
    """The page's numbers in plain types; NaN becomes None. ``files`` are all in the folder but this one."""
    content = {name: value for name, value in vars(explanation).items() if name not in ("slices", "overlays")}
    result: dict[str, Any] = plain(
        {
            "made_by": "masksam explain",
            **content,
            "slices": [item.facts for item in explanation.slices],
            "overlays": explanation.overlays,
            "files": sorted(files),
        }
    )
    return result
