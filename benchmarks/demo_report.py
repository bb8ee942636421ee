"""The demo's report: one self-contained HTML page and the same numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from masksam_nnunet.files import write_json, write_text_atomically
from masksam_nnunet.inference.history import TrainingStats
from masksam_nnunet.inference.report.html import Picture, environment, number, plain
from masksam_nnunet.inference.scoring import Scores


@dataclass(frozen=True)
class Cell:
    """One number of a table as text, and whether it is the row's best."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class MethodResult:
    """One trained method.

    Attributes:
        name: for people.
        trainer: nnU-Net's name for it.
        scores: on the fold's validation cases.
        stats: of its training.
    """

    name: str
    trainer: str
    scores: Scores
    stats: TrainingStats


@dataclass(frozen=True)
class Report:
    """All that the report says.

    Attributes:
        dataset: name of the raw dataset.
        phantoms: whether its images were computed by this package.
        fold: nnU-Net's fold.
        cases: its validation cases.
        training_cases: how many there were.
        configuration: nnU-Net's configuration.
        batch_size: of both methods.
        minutes: training time of each method.
        device: that trained.
        versions: of the software, by name.
        scoring: what each score means, by its key in the JSON.
        notes: what else a reader must know about this run.
        methods: in the order of the tables.
        classes: their colours by name.
        curves: of the training.
        case_pictures: of validation cases.
        inside_pictures: of MaskSAM's prompts.
        commands: what can be run next; paths relative to ``$OUT``.
    """

    dataset: str
    phantoms: bool
    fold: int
    cases: Sequence[str]
    training_cases: int
    configuration: str
    batch_size: int
    minutes: float
    device: str
    versions: Mapping[str, str]
    scoring: Mapping[str, str]
    notes: Sequence[str]
    methods: Sequence[MethodResult]
    classes: Mapping[str, str]
    curves: Picture
    case_pictures: Sequence[Picture]
    inside_pictures: Sequence[Picture]
    commands: Sequence[str]


def write_report(out: Path, report: Report) -> Path:
    """Write report.json and report.html into ``out``, each whole or not at all; returns the page's path."""
    write_json(out / "report.json", to_json(report))
    page = out / "report.html"
    write_text_atomically(page, render(report))
    return page


def to_json(report: Report) -> dict[str, Any]:
    """The report's numbers in plain types; NaN becomes None."""
    content = {
        "dataset": report.dataset,
        "fold": report.fold,
        "cases": list(report.cases),
        "training_cases": report.training_cases,
        "configuration": report.configuration,
        "batch_size": report.batch_size,
        "minutes": report.minutes,
        "device": report.device,
        "versions": dict(report.versions),
        "scoring": dict(report.scoring),
        "surface_dice_tolerance_mm": report.methods[0].scores.tolerance_mm,
        "notes": list(report.notes),
        "methods": [_method_json(method) for method in report.methods],
    }
    result: dict[str, Any] = plain(content)
    return result


def render(report: Report) -> str:
    """The HTML page: everything inline, nothing fetched from elsewhere."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            overall=overall_rows(report.methods),
            per_class={name: class_rows(report.methods, name) for name in report.classes},
            per_case=[(case, case_row(report.methods, index)) for index, case in enumerate(sorted(report.cases))],
            tolerance=f"{report.methods[0].scores.tolerance_mm:g}",
            minutes=f"{report.minutes:g}",
        )
    )


def overall_rows(methods: Sequence[MethodResult]) -> list[tuple[str, list[Cell]]]:
    """Rows of the first table: a title and a cell for each method."""
    return [
        ("Mean Dice", _cells([m.scores.mean_dice for m in methods], number(3), max)),
        ("Mean HD95 [mm]", _cells([m.scores.mean_hd95_mm for m in methods], number(2), min)),
        ("Mean surface Dice", _cells([m.scores.mean_surface_dice for m in methods], number(3), max)),
        ("Training time [s]", _cells([m.stats.train_seconds for m in methods], number(0))),
        ("Iterations", _cells([m.stats.iterations for m in methods], number(0))),
        ("Peak memory [MiB]", _cells([m.stats.peak_memory_mb for m in methods], number(0))),
        ("Parameters", _cells([m.stats.parameters for m in methods], number(0))),
        ("Trainable parameters", _cells([m.stats.trainable_parameters for m in methods], number(0))),
    ]


def class_rows(methods: Sequence[MethodResult], name: str) -> list[tuple[str, list[Cell]]]:
    """Rows of one class's table."""
    scores = [m.scores.per_class[name] for m in methods]
    return [
        ("Dice", _cells([s.dice for s in scores], number(3), max)),
        ("HD95 [mm]", _cells([s.hd95_mm for s in scores], number(2), min)),
        ("Cases with HD95", _cells([m.scores.defined_distances(name) for m in methods], number(0))),
        ("Surface Dice", _cells([s.surface_dice for s in scores], number(3), max)),
        ("Volume predicted [ml]", _cells([s.predicted_ml for s in scores], number(2))),
        ("Volume in truth [ml]", _cells([s.truth_ml for s in scores], number(2))),
    ]


def case_row(methods: Sequence[MethodResult], index: int) -> list[Cell]:
    """Mean Dice of one case for each method."""
    return _cells([m.scores.cases[index].mean_dice for m in methods], number(3), max)


def _cells(
    values: Sequence[float],
    text: Callable[[float], str],
    best: Callable[[Sequence[float]], float] | None = None,
) -> list[Cell]:
    """Cells of one row; ``best`` is max, min or None.

    None is marked best where all read alike, or where one is undefined: the others have nothing to beat.
    """
    shown = [text(value) for value in values]
    if best is None or len(set(shown)) == 1 or any(math.isnan(value) for value in values):
        return [Cell(one) for one in shown]
    winner = text(best(values))
    return [Cell(one, one == winner) for one in shown]


def _method_json(method: MethodResult) -> dict[str, Any]:
    scores = method.scores
    return {
        "name": method.name,
        "trainer": method.trainer,
        "mean_dice": scores.mean_dice,
        "mean_hd95_mm": scores.mean_hd95_mm,
        "mean_surface_dice": scores.mean_surface_dice,
        "per_class": {
            name: asdict(score) | {"hd95_cases": scores.defined_distances(name)}
            for name, score in scores.per_class.items()
        },
        "per_case": {case.case: {name: asdict(score) for name, score in case.classes.items()} for case in scores.cases},
        **asdict(method.stats) | {"patch_size": list(method.stats.patch_size)},
    }
