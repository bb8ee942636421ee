"""What all our drawings share: colours, names as text, axes, PNG. Without pyplot: no global state, no window."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .text_pieces import pieces

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#0072b2")
"""Okabe and Ito's, told apart by nearly all colour-blind readers; all but black, which is lost on dark images."""

LINE_STYLES = ("solid", "dashed", "dotted")
"""Tell classes or methods apart where colours repeat."""

METHOD_COLOURS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the same palette, the grey of a baseline first."""

_DPI = 144


def literal(text: str) -> str:
    """``text`` such that matplotlib takes no dollar in it for mathematics."""
    return text.replace("$", r"\$")


def wrapped(name: str, width: int, lines: int = 3) -> str:
    """``name`` broken at spaces and underscores into lines of about ``width``, the rest cut off; literal."""
    rows = [""]
    for piece in pieces(name, width):
        if rows[-1] and len(rows[-1]) + len(piece.rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1] + "…"]
    return literal("\n".join(row.strip() for row in rows))


def tidy(axes: Sequence[Axes]) -> None:
    """Small labels, no frame above and right, a faint grid."""
    for ax in axes:
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, lw=0.5)


def spread(figure: Figure) -> None:
    """More room between the lines of a figure whose layout is constrained."""
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(h_pad=0.12)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
