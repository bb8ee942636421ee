"""Plots of scores and of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from masksam_nnunet.inference.history import History
from masksam_nnunet.inference.report.figures import literal, png

METHOD_COLOURS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, with a grey for the baseline, which comes first."""


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
