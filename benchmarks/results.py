"""What a benchmark finds: one long table of scores, what statistics make of it, and what the trainings took.

The table of scores has the columns ``method, kind, fold, patient, case, class, metric, value``, one line for each
value, which is NaN where the metric is undefined. ``method`` is the name of a :class:`Row`. Tables, plots, CSV files
and comparisons are all derived from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from masksam_nnunet.inference.methods import Method

if TYPE_CHECKING:  # a process that only waits for a training needs none of these
    import pandas as pd

    from masksam_nnunet.inference.history import History
    from masksam_nnunet.inference.report.html import Picture

Kind = Literal["method", "ensemble", "postprocessed"]

MEAN = "mean over classes"
"""Stands in a column ``class`` for the mean over the classes where a metric is defined, taken within each case."""


@dataclass(frozen=True)
class MetricStyle:
    """How a metric is named and printed, and whether larger values are better."""

    title: str
    unit: str
    digits: int
    larger_is_better: bool

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    @property
    def arrow(self) -> str:
        """Which direction is better."""
        return "↑" if self.larger_is_better else "↓"


METRICS: Mapping[str, MetricStyle] = {
    "dice": MetricStyle("Dice", "", 3, True),
    "hd95_mm": MetricStyle("HD95", "mm", 2, False),
    "surface_dice": MetricStyle("Surface Dice", "", 3, True),
    "volume_error_ml": MetricStyle("Absolute volume error", "ml", 2, False),
}
"""The metrics that are averaged and compared, by their name in the table of scores."""


@dataclass(frozen=True)
class FoldCompute:
    """What the training of one fold took; None where it was not recorded.

    Attributes:
        fold: its number.
        seconds: of training, without validation and without work that an interruption lost.
        peak_memory_mib: of what ``peak_memory_of`` names.
        peak_memory_of: GPU allocations, or the process.
        device: that trained.
        iterations: optimizer steps.
        epochs: of nnU-Net's loop.
        parameters: of the network.
        trainable_parameters: those that were trained.
        checkpoint_bytes: size of checkpoint_final.pth.
        resumed: how often the training continued after an interruption.
        git_hash: of this package's checkout; several with ``then`` between them.
        wall_seconds: from each start to the validation or the interruption, loading included.
        versions: of the packages that trained; several with ``then`` between them.
    """

    fold: int
    seconds: float | None
    peak_memory_mib: float | None
    peak_memory_of: str
    device: str
    iterations: int | None
    epochs: int | None
    parameters: int | None
    trainable_parameters: int | None
    checkpoint_bytes: int
    resumed: int
    git_hash: str | None
    wall_seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of the tables: a method, an ensemble of methods, or one of these with nnU-Net's post-processing.

    Attributes:
        name: for people, unique; the column ``method`` of the table of scores.
        kind: which of the three.
        members: the trained methods.
        predictions: the folder of the scored label maps, one file for each case.
    """

    name: str
    kind: Kind
    members: tuple[Method, ...]
    predictions: Path


@dataclass(frozen=True)
class Finding:
    """Something that bears on fairness; a severe one must be accepted by the user and opens the report."""

    severe: bool
    text: str


@dataclass(frozen=True)
class BenchmarkResults:
    """Everything that a benchmark's report shows.

    Attributes:
        dataset: its full name.
        dataset_json: its description.
        configuration: nnU-Net's.
        cases: validation cases by fold.
        tolerance_mm: of the surface Dice.
        rows: in the order of the tables.
        scores: the long table, see this module's docstring.
        means: columns ``method, kind, metric, class, mean, low, high, median, cases``; ``low`` and ``high`` bound the
            95 % interval of the mean.
        comparisons: see :func:`.statistics.compare`.
        test_set: columns ``method, case, class, metric, value``; empty without labelled test cases.
        compute: by method, one entry for each fold.
        histories: nnU-Net's log by method and fold.
        findings: of the fairness checks.
        best: the row that nnUNetv2_find_best_configuration chose.
        policies: what each score means.
        versions: of the packages that evaluated.
        git_hash: of this package's checkout, if it is one.
        commands: exactly what was run.
        images: the raw dataset's imagesTr.
        truths: folder of the true label maps.
        notes: what a reader must know about this run before its numbers.
        inside: how MaskSAM prompts itself on a case, if a MaskSAM was trained.
    """

    dataset: str
    dataset_json: Mapping[str, object]
    configuration: str
    cases: Mapping[int, tuple[str, ...]]
    tolerance_mm: float
    rows: tuple[Row, ...]
    scores: pd.DataFrame
    means: pd.DataFrame
    comparisons: pd.DataFrame
    test_set: pd.DataFrame
    compute: Mapping[str, tuple[FoldCompute, ...]]
    histories: Mapping[str, Mapping[int, History]]
    findings: tuple[Finding, ...]
    best: str | None
    policies: Mapping[str, str]
    versions: Mapping[str, str]
    git_hash: str | None
    commands: tuple[str, ...]
    images: Path
    truths: Path
    notes: tuple[str, ...] = ()
    inside: tuple[Picture, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes, in nnU-Net's order."""
        return list(self.scores["class"].unique())

    @property
    def focus(self) -> Row:
        """The row that chooses the cases to show: the first MaskSAM, else the first row."""
        ours = (row for row in self.rows if row.kind == "method" and is_masksam(row.members[0]))
        return next(ours, self.rows[0])


def is_masksam(method: Method) -> bool:
    """Whether the method's trainer is one of MaskSAM's, by its name."""
    return "masksam" in method.trainer.lower()


def row_names(methods: Sequence[Method]) -> dict[Method, str]:
    """A short unique name for each method: its trainer, and its plans where they are needed to tell it apart."""
    trainers = Counter(method.trainer for method in methods)
    return {
        method: method.trainer
        if trainers[method.trainer] == 1 and method.plans == "nnUNetPlans"
        else f"{method.trainer} ({method.plans})"
        for method in methods
    }


def joint_name(names: Sequence[str]) -> str:
    """The name of an ensemble."""
    return " + ".join(names)
