"""``masksam benchmark --train-cases``: the same benchmark on nested subsets of each fold's training patients.

Each subset is a benchmark in a view of nnU-Net's folders: symbolic links to the preprocessed dataset, with a
splits_final.json of its own, and its own results. ``all`` is the plain benchmark in nnU-Net's own folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from masksam_nnunet.environment import variable
from masksam_nnunet.errors import MaskSAMError, TrainingError, UsageError
from masksam_nnunet.files import atomic_write, read_json, write_json, write_text_atomically
from masksam_nnunet.gpu import require_devices
from masksam_nnunet.inference.report.figures import LINE_STYLES, wrapped
from masksam_nnunet.inference.report.html import number
from masksam_nnunet.plans.splits import SPLITS_FILE, Fold

from .definition import FOLDERS, Benchmark
from .plots import METHOD_COLOURS, tidy_png
from .run import run_benchmark
from .statistics import bootstrap_mean, patient_of

ALL, PICTURE = "all", "few_labels.png"
COLUMNS = ("method", "size", "training_patients", "seed", "fold", "patient", "case", "class", "dice")
"""Of few_labels.csv: ``size`` is as on the command line, ``training_patients`` the fold's; ``all`` has seed 0."""
_DODGE = 1.025  # factor between methods along the logarithmic axis, so that their intervals stand side by side


class Subset(NamedTuple):
    """One benchmark of a study."""

    size: int | None  # patients that each fold is trained on; None is all
    seed: int = 0  # of their draw

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"train_{self.size or ALL}" + (f"_seed_{self.seed}" if self.seed else "")


def run_few_labels(
    benchmark: Benchmark,
    out: Path | None,
    devices: Sequence[str],
    sizes: Sequence[str],
    seeds: Sequence[int],
    console: Console | None = None,
) -> Path:
    """Run the benchmark on each subset, and write few_labels.csv and few_labels.png, whose path is returned.

    Args:
        benchmark: what to compare, on whole folds.
        out: the study's folder; None is a folder beside the trained models.
        devices: as ``-device``.
        sizes, seeds: as ``--train-cases`` and ``--seeds``.
        console: for progress.

    Raises:
        MaskSAMError: bad input, before anything is trained.
        TrainingError: some subsets failed; all others are kept, in the table and the picture too.
    """
    console = console or Console()
    subsets = parse_subsets(sizes, seeds)
    require_devices(devices)
    benchmark.check_inputs()
    out = Path(os.path.abspath(out or benchmark.results / f"few_labels_{benchmark.configuration}"))
    splits: list[Fold] = read_json(benchmark.preprocessed / SPLITS_FILE)
    cases = sorted({case for fold in splits for part in ("train", "val") for case in fold[part]})
    patients = patient_of(cases, benchmark.patients(cases))
    cut = {subset: cut_splits(splits, patients, subset, benchmark.folds) for subset in subsets}
    whole = training_patients(splits, patients)
    if subsets[-1].size is None and {whole[fold] for fold in benchmark.folds} <= {subset.size for subset in subsets}:
        raise UsageError(
            f"--train-cases {' '.join(sizes)}: {whole[benchmark.folds[0]]} patients are all; leave one out"
        )
    runs = {}
    for subset, folds in cut.items():
        runs[subset] = benchmark
        if subset.size is not None:
            write_view(out / subset.name, benchmark.preprocessed, folds)
            note = f"Each fold was trained on {subset.size} of its training patients, drawn with seed {subset.seed}."
            changes = {"train_patients": subset.size, "seed": subset.seed, "notes": (*benchmark.notes, note)}
            runs[subset] = benchmark.model_copy(update=changes)
        with own_folders(out / subset.name):
            runs[subset].check()
    tables, errors = [], []
    for subset, one in runs.items():
        console.rule(subset.name)
        try:
            with own_folders(out / subset.name):
                run_benchmark(one, out / subset.name, devices, console)
            tables.append(read_dice(out / subset.name, subset, training_patients(cut[subset], patients)))
        except MaskSAMError as error:
            errors.append(f"{subset.name}: {error}")
    if tables:
        write_results(pd.concat(tables, ignore_index=True), title(benchmark), out, console)
    if errors:
        raise TrainingError("\n\n".join(errors))
    return out / PICTURE


# ---- subsets and their folders ---------------------------------------------------------------------------------------


def parse_subsets(sizes: Sequence[str], seeds: Sequence[int]) -> list[Subset]:
    """The subsets that ``--train-cases`` and ``--seeds`` name, small ones first, :data:`ALL` once and last.

    Raises:
        UsageError: a size is neither a number of at least 1 nor :data:`ALL`; a size or a seed is named twice.
    """
    for text in sizes:
        if text != ALL and not (text.isdecimal() and int(text)):
            raise UsageError(f"--train-cases {text}: give numbers of at least 1, or {ALL}, such as 2 4 8 16 {ALL}")
    numbers = sorted({int(text) for text in sizes if text != ALL})
    whole = [Subset(None)] if ALL in sizes else []
    if len(numbers) + len(whole) < len(sizes):
        raise UsageError(f"--train-cases {' '.join(sizes)}: name each size once")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: name each once")
    return [Subset(size, seed) for size in numbers for seed in seeds] + whole


def cut_splits(splits: Sequence[Fold], patients: Mapping[str, str], subset: Subset, folds: Sequence[int]) -> list[Fold]:
    """``splits`` with the cases of the subset's patients in each training part, and untouched validation cases.

    A seed and a fold give one order of the patients, of which a subset takes the first: larger ones hold smaller ones.
    ``patients`` are given by case. Folds other than the chosen ``folds`` may have fewer patients.

    Raises:
        UsageError: one of ``folds`` has fewer patients.
    """
    if subset.size is None:
        return list(splits)
    result = []
    for index, fold in enumerate(splits):
        there = sorted({patients[case] for case in fold["train"]})
        if index in folds and subset.size > len(there):
            raise UsageError(
                f"--train-cases {subset.size}: fold {index} has only {len(there)} training patients; give at most "
                f"{len(there)}, or {ALL}"
            )
        # RandomState: its numbers stay the same in every version of numpy.
        order = np.random.RandomState([subset.seed, index]).permutation(len(there))
        kept = {there[place] for place in order[: subset.size]}
        result.append({"train": [case for case in fold["train"] if patients[case] in kept], "val": fold["val"]})
    return result


def training_patients(splits: Sequence[Fold], patients: Mapping[str, str]) -> dict[int, int]:
    """The number of training patients by fold."""
    return {index: len({patients[case] for case in fold["train"]}) for index, fold in enumerate(splits)}


def write_view(folder: Path, preprocessed: Path, splits: Sequence[Fold]) -> None:
    """Make a view of ``preprocessed``, the dataset's folder, in ``folder / nnUNet_preprocessed``, with these splits.

    Raises:
        UsageError: the folder holds a view with other splits, or cannot be written.
    """
    view = folder / "nnUNet_preprocessed" / preprocessed.name
    try:
        view.mkdir(parents=True, exist_ok=True)
        if not (view / SPLITS_FILE).exists():
            write_json(view / SPLITS_FILE, splits)
        elif read_json(view / SPLITS_FILE) != splits:
            raise UsageError(
                f"{folder} was begun with another split or --group; go back to that, remove the folder, or give "
                "another --out"
            )
        for target in Path(os.path.abspath(preprocessed)).glob("[!.]*"):
            link = view / target.name
            if target.name != SPLITS_FILE and not (link.is_symlink() and link.readlink() == target):
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    except (OSError, ValueError) as error:
        raise UsageError(f"{view} cannot be used ({error}); give another --out, where links can be made") from error


@contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    """Let nnU-Net's folders be those in a subset's ``folder``, if it has any, for a block of code."""
    with ExitStack() as stack:
        for name in FOLDERS[1:] if (folder / "nnUNet_preprocessed").is_dir() else ():
            stack.enter_context(variable(name, os.path.abspath(folder / name)))
        yield


# ---- results ---------------------------------------------------------------------------------------------------------


def read_dice(folder: Path, subset: Subset, patients: Mapping[int, int]) -> pd.DataFrame:
    """The table of :data:`COLUMNS` from a subset's scores.csv; training ``patients`` are given by fold."""
    names = dict.fromkeys(("method", "case", "patient", "class"), str)  # a case may be called 001, a class NA
    found = pd.read_csv(folder / "scores.csv", dtype=names, keep_default_na=False, na_values={"value": [""]})
    found = found[(found["metric"] == "dice") & (found["kind"] == "method")].rename(columns={"value": "dice"})
    found = found.assign(size=str(subset.size or ALL), seed=subset.seed, training_patients=found["fold"].map(patients))
    return found[list(COLUMNS)]


def mean_dice(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over classes and cases with 95 % intervals, drawing whole patients, from the table of :data:`COLUMNS`.

    Returns:
        Columns ``method, size, patients, mean, low, high, draws``: ``patients`` is the mean number of training patients
        of the folds, ``draws`` lists the mean of each seed.
    """
    keys = ["method", "size", "training_patients", "seed", "patient", "case"]
    of_cases = scores.groupby(keys, sort=False, as_index=False)["dice"].mean()
    lines = []
    for key, group in of_cases.groupby(["method", "size"], sort=False):
        defined, draws = group.dropna(subset="dice"), group.groupby("seed")["dice"].mean()
        interval = bootstrap_mean(defined["dice"], defined["patient"])
        lines.append((*key, group["training_patients"].mean(), *interval, list(draws)))
    return pd.DataFrame(lines, columns=["method", "size", "patients", "mean", "low", "high", "draws"])


def title(benchmark: Benchmark) -> str:
    """What was trained on, and for how long."""
    folds = f"fold{'s' if len(benchmark.folds) > 1 else ''} {', '.join(map(str, benchmark.folds))}"
    minutes = [] if benchmark.minutes is None else [f"{benchmark.minutes:g} minutes of training"]
    iterations = [] if benchmark.iterations is None else [f"{benchmark.iterations} iterations"]
    return ", ".join([benchmark.dataset, benchmark.configuration, folds, *minutes, *iterations])


def write_results(scores: pd.DataFrame, title: str, out: Path, console: Console) -> None:
    """Write the table of :data:`COLUMNS` and its picture, and print the means; a UsageError if it cannot be written."""
    means, text = mean_dice(scores), number(3)
    try:
        write_text_atomically(out / "few_labels.csv", scores.to_csv(index=False, lineterminator="\n"))
        with atomic_write(out / PICTURE) as draft:
            draft.write_bytes(draw(means, title))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}; make room, then run again") from error
    table = Table(Column("mean Dice", overflow="fold"), *means["size"].unique())
    for method, lines in means.groupby("method", sort=False):
        cells = (f"{text(one.mean)}\n{text(one.low)}–{text(one.high)}" for one in lines.itertuples(index=False))
        table.add_row(escape(str(method)), *cells)
    console.print("training patients in each fold, and 95 % intervals over validated patients:", highlight=False)
    console.print(table)


def draw(means: pd.DataFrame, title: str) -> bytes:
    """Draw the table of :func:`mean_dice` as Dice against the number of training patients, a line for each method."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    ax, methods = figure.subplots(), list(means["method"].unique())
    for index, method in enumerate(methods):
        line = means[means["method"] == method]
        x = line["patients"] * _DODGE ** (index - (len(methods) - 1) / 2)
        colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
        style = LINE_STYLES[index // len(METHOD_COLOURS) % len(LINE_STYLES)]
        ax.plot(x, line["mean"], marker="o", markersize=5, linestyle=style, label=wrapped(method, 40), color=colour)
        ax.vlines(x, line["low"], line["high"], color=colour)
        for place, draws in zip(x, line["draws"], strict=True):
            ax.plot([place] * len(draws), draws, "_" if len(draws) > 1 else "", color=colour)
    sizes = means.groupby("size", sort=False)["patients"].mean()
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{ALL}: {count:.3g}" if size == ALL else size for size, count in sizes.items()])
    ax.minorticks_off()
    ax.set(xlabel=f"training patients in each fold ({title})", ylabel="mean Dice over classes and cases, 95 % interval")
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))  # above: intervals reach everywhere
    return tidy_png(figure)
