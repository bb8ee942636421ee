"""Pictures of the report, each with its caption: plots of scores and trainings, and the worst, median and best case."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import MatplotlibDeprecationWarning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from masksam_nnunet.errors import MaskSAMError, in_short
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.inference.provenance import History
from masksam_nnunet.inference.report.figures import CaseImages, colours_or_grey, draw_case, png, wrapped
from masksam_nnunet.inference.report.html import Picture, number
from masksam_nnunet.plans.images import read_image

from .results import MEAN, METRICS, BenchmarkResults, Row
from .statistics import averaged, differences

METHOD_COLOURS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, with a grey for the baseline, which comes first."""
BETTER, WORSE, EQUAL = METHOD_COLOURS[1], METHOD_COLOURS[2], METHOD_COLOURS[0]
_WIDTH = 11.0
_PANELS_IN_LINE = 4
_LOSSES_IN_FIGURE = 3
_PROGRESS = {"hours": "hours of training", "epoch": "epochs"}


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """The colour of each row; with post-processing it looks as without."""
    members = list(dict.fromkeys(row.members for row in rows))
    return {row.name: METHOD_COLOURS[members.index(row.members) % len(METHOD_COLOURS)] for row in rows}


# ---- scores of cases -------------------------------------------------------------------------------------------------


def draw_boxes(results: BenchmarkResults) -> list[Picture]:
    """Box plots of every metric, and of the Dice of every class, one box for each row."""
    panels = {key: table for key, table in averaged(results.scores).groupby(["metric", "class"])}
    how = (
        "Each dot is a case. Boxes span the quartiles with the median as a line, the diamond is the mean, whiskers "
        "reach the last case within 1.5 box lengths. Undefined scores are left out."
    )
    means = {metric.directed: (name, panels[name, MEAN]) for name, metric in METRICS.items()}
    pictures = [Picture("Scores of all cases", f"Means over classes within each case. {how}", _boxes(results, means))]
    if len(results.classes) > 1:
        dice = {wrapped(name, 24, 2): ("dice", panels["dice", name]) for name in results.classes}
        pictures.append(Picture("Dice by class", how, _boxes(results, dice)))
    return pictures


def _boxes(results: BenchmarkResults, panels: Mapping[str, tuple[str, pd.DataFrame]]) -> bytes:
    names = [row.name for row in results.rows]
    columns = min(len(panels), _PANELS_IN_LINE)
    lines = math.ceil(len(panels) / columns)
    figure, axes = _panels(lines, columns, lines * (0.42 * len(names) + 0.75), sharey=True)
    shared = {"x": "value", "y": "method", "order": names, "hue": "method", "hue_order": names, "legend": False}
    shared |= {"palette": _colours(results.rows)}
    shape = {"fill": False, "width": 0.62, "linewidth": 1.1, "showfliers": False, "showmeans": True}
    mean = {"marker": "D", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": "black"}
    for ax, (title, (metric, table)) in zip(axes.flat, panels.items(), strict=False):
        ax.set(title=title)
        values = table["value"].dropna()
        if values.empty:  # seaborn draws no empty boxes
            ax.text(0.5, 0.5, "undefined in all cases", transform=ax.transAxes, fontsize=7, ha="center", va="center")
            continue
        sns.stripplot(table, **shared, ax=ax, size=2.2, alpha=0.45, jitter=0.2)
        with warnings.catch_warnings():  # seaborn passes an argument that matplotlib deprecates
            warnings.simplefilter("ignore", MatplotlibDeprecationWarning)
            sns.boxplot(table, **shared, ax=ax, **shape, meanprops=mean)
        ax.set(xlabel="", ylabel="")
        if METRICS[metric].larger_is_better:  # shares end at 1, lengths and volumes start at 0
            ax.set_xlim(max(math.floor(values.min() * 10 - 1e-9) / 10, 0.0) - 0.02, 1.01)
            continue
        if values.max() > 30 * values.median() > 0:
            ax.set_xscale("symlog", linthresh=float(values.median()))
            ax.set_xlabel("logarithmic above the median")
        ax.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(names)), [wrapped(name, 30) for name in names])
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return tidy_png(figure)


def draw_differences(results: BenchmarkResults) -> list[Picture]:
    """The focus and each row that it was compared with, case by case."""
    pairs = results.comparisons[["a", "b"]].drop_duplicates().itertuples(index=False)
    return [
        Picture(
            f"{a} minus {b}",
            "Each line is a case, its mean over the classes that are defined for both, sorted by the difference; "
            f"blue where {a} is better, orange where it is worse, grey where both are equal. Dashed: the mean; "
            "grey band: its 95 % interval. Cases where the metric is undefined for one of the two are left out.",
            _differences(results, a, b),
        )
        for a, b in pairs
        if results.focus.name in (a, b)
    ]


def _differences(results: BenchmarkResults, a: str, b: str) -> bytes:
    figure, axes = _panels(1, len(METRICS), 2.7)
    for ax, (name, metric) in zip(axes.flat, METRICS.items(), strict=True):
        ax.set(title=metric.heading, xticks=[])
        found = differences(results.scores, name, a, b)[MEAN].dropna().sort_values().to_numpy()
        if not len(found):
            ax.text(0.5, 0.5, "no case where both are defined", transform=ax.transAxes, fontsize=8, ha="center")
            ax.set_yticks([])
            continue
        gains = np.sign(found) * (1 if metric.larger_is_better else -1)
        colours = np.choose(gains.astype(int) + 1, (WORSE, EQUAL, BETTER)).tolist()
        places = np.arange(len(found))
        ax.vlines(places, 0, found, colors=colours, linewidth=min(1.6, 160 / len(found)))
        ax.scatter(places, found, s=7, c=colours, linewidths=0, zorder=3)
        ax.axhline(0, color="black", lw=0.8)
        ax.axhline(found.mean(), color="black", lw=1.1, ls="dashed")
        compared = results.comparisons.set_index(["metric", "class", "a", "b"]).loc[(name, MEAN, a, b)]
        if not math.isnan(compared["low"]):
            ax.axhspan(compared["low"], compared["high"], color="black", alpha=0.12, lw=0)
        ax.set_xlabel(f"better in {(gains > 0).sum()}, worse in {(gains < 0).sum()}, of {len(found)}")
    axes[0, 0].set_ylabel("difference")
    return tidy_png(figure)


# ---- learning curves -------------------------------------------------------------------------------------------------


def draw_curves(results: BenchmarkResults) -> list[Picture]:
    """Pseudo Dice of all methods, then the losses of each, over hours and over epochs."""
    lines = "Thin: a line for each fold; thick: their mean, over the epochs that every fold has."
    curves = {name: _curves(folds) for name, folds in results.histories.items()}
    if not curves:
        return []
    colours, names = _colours(results.rows), list(curves)
    figure, axes = _panels(1, 2, 3.6, sharey=True)
    for ax, x in zip(axes.flat, _PROGRESS, strict=True):
        for name, table in curves.items():
            _curve(ax, table, x, "pseudo_dice", colours[name], "solid", wrapped(name, 44, 2))
        ax.set(title="Pseudo-Dice on validation patches", ylim=(0, 1))
    axes[0, 1].legend(frameon=False, fontsize=8, loc="lower right")
    about = f"nnU-Net's estimate on random validation patches, once an epoch. {lines}"
    pictures = [Picture("Dice during training", about, tidy_png(figure))]
    about = f"{lines} Losses of different methods are not comparable: each trains with its own."
    for start in range(0, len(names), _LOSSES_IN_FIGURE):
        part = names[start : start + _LOSSES_IN_FIGURE]
        figure, axes = _panels(len(part), 2, 2.8 * len(part), sharey="row")
        for name, panes in zip(part, axes, strict=True):
            for ax, x in zip(panes, _PROGRESS, strict=True):
                _curve(ax, curves[name], x, "train_loss", colours[name], "solid", "training")
                _curve(ax, curves[name], x, "val_loss", "black", "dashed", "validation")
                ax.set_title(f"Losses of {wrapped(name, 60, 1)}")
            panes[1].legend(frameon=False, fontsize=8)
        pictures.append(Picture("Losses", about, tidy_png(figure)))
    return pictures


def _curves(folds: Mapping[int, History]) -> pd.DataFrame:
    """The histories of a method as a table: ``fold, epoch, hours, train_loss, val_loss, pseudo_dice``."""
    tables = {fold: pd.DataFrame(asdict(history)) for fold, history in folds.items()}
    table = pd.concat(tables, names=["fold", "epoch"]).reset_index()
    return table.assign(epoch=table["epoch"] + 1, hours=table["seconds"] / 3600)


def _curve(ax: Axes, table: pd.DataFrame, x: str, y: str, colour: str, line: str, label: str) -> None:
    ax.set_xlabel(_PROGRESS[x])
    defined = table.dropna(subset=y)
    for _, fold in defined.groupby("fold"):
        ax.plot(fold[x], fold[y], color=colour, ls=line, lw=0.6, alpha=0.45)
    by_epoch = defined.groupby("epoch")
    mean = by_epoch[["hours", y]].mean()[by_epoch.size() == table["fold"].nunique()].reset_index()
    ax.plot(mean[x], mean[y], color=colour, ls=line, lw=2.2, label=label, marker="o" if len(mean) == 1 else None)


# ---- cases -----------------------------------------------------------------------------------------------------------


def choose_cases(results: BenchmarkResults) -> dict[str, str]:
    """Worst, median and best case by the mean Dice of the focus, each with this word; fewer where there are fewer."""
    dice = _mean_dice(results)[results.focus.name].sort_values(kind="stable")
    ordered = list(dice.dropna().index) or list(dice.index)
    if len(ordered) == 1:
        return {ordered[0]: "Only case"}
    chosen = {ordered[0]: "Worst case", ordered[len(ordered) // 2]: "Median case"} if len(ordered) > 2 else {}
    return chosen | {ordered[0]: "Worst case", ordered[-1]: "Best case"}


def draw_cases(results: BenchmarkResults) -> list[Picture]:
    """A picture of each of :func:`choose_cases`. Where files are missing it has no PNG, and its caption says why."""
    dice, text = _mean_dice(results), number(METRICS["dice"].digits)
    pictures = []
    for case, place in choose_cases(results).items():
        name = results.focus.name
        (fold,) = (fold for fold, names in results.cases.items() if case in names)
        caption = f"{place} by the mean Dice of {name} ({text(dice.loc[case, name])}), validated in fold {fold}"
        notes = {row.name: f"Dice {text(dice.loc[case, row.name])}" for row in results.rows}
        try:
            picture = draw_case(_read(results, case, notes), Classes.from_dataset_json(results.dataset_json))
        # A picture must not cost the report of days of training.
        except (MaskSAMError, OSError, RuntimeError, ValueError) as error:
            pictures.append(Picture(case, f"{caption}. It could not be drawn: {in_short(error)}", b""))
            continue
        caption += (
            f". Shown are the slice with most labelled voxels and, of the others, the one with most errors of {name}, "
            "if there are any. All columns share one grey window; cropped to what truth or any prediction labels."
        )
        pictures.append(Picture(case, caption, picture))
    return pictures


def _mean_dice(results: BenchmarkResults) -> pd.DataFrame:
    """The mean Dice over classes: a line for each case, a column for each row."""
    dice = results.scores[results.scores["metric"] == "dice"]
    return dice.pivot_table(index="case", columns="method", values="value", dropna=False)


def _read(results: BenchmarkResults, case: str, notes: Mapping[str, str]) -> CaseImages:
    description: dict[str, Any] = dict(results.dataset_json)
    file = results.images / f"{case}_0000{description['file_ending']}"
    if case in (listed := description.get("dataset", {})):  # where nnU-Net looks first
        file = results.images.parent / str(listed[case]["images"][0])
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    image = colours_or_grey(read_image(file, description)[0], description["file_ending"])
    truth = read_label_map(results.truths, case, description)
    rows = [row for row in results.rows if row.kind != "postprocessed"]
    predictions = {row.name: read_label_map(row.predictions, case, description).labels for row in rows}
    for name, labels in {"truth": truth.labels, **predictions}.items():
        if labels.shape != image.shape[:3]:
            raise ValueError(f"the image of {case} has shape {image.shape[:3]}, {name} {labels.shape}")
    return CaseImages(image, truth.grid.spacing, truth.labels, predictions, results.focus.name, notes)


# ---- parts of all plots ----------------------------------------------------------------------------------------------


def _panels(
    lines: int, columns: int, height: float, sharey: bool | Literal["row"] = False
) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr, call-arg]  # room between lines of panels
    return figure, figure.subplots(lines, columns, squeeze=False, sharey=sharey)


def tidy_png(figure: Figure) -> bytes:
    """Small labels, no frame above and right, a faint grid."""
    for ax in figure.axes:
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, lw=0.5)
    return png(figure)
