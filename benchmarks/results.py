"""What a benchmark finds: one long table of scores, what statistics make of it, and what the trainings took.

The table of scores has the columns :data:`COLUMNS`, one line for each value, which is NaN where the metric is
undefined. ``method`` is the name of a :class:`Row`. Tables, plots, CSV files and comparisons are all derived from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from masksam_nnunet.inference.methods import ModelName

if TYPE_CHECKING:  # a process that only waits for a training needs none of these
    import pandas as pd

    from masksam_nnunet.inference.provenance import History
    from masksam_nnunet.inference.report.html import Picture

COLUMNS = ("method", "kind", "fold", "patient", "case", "class", "metric", "value")
Kind = Literal["method", "ensemble", "postprocessed"]

MEAN = "mean over classes"
"""Stands in a column ``class`` for the mean over the classes where a metric is defined, taken within each case."""


class Metric(NamedTuple):
    """How a metric is named and printed, and whether larger values are better."""

    heading: str
    digits: int
    larger_is_better: bool

    @property
    def directed(self) -> str:
        """The heading with an arrow towards better values."""
        return f"{self.heading} {'↑' if self.larger_is_better else '↓'}"


METRICS: Mapping[str, Metric] = {
    "dice": Metric("Dice", 3, True),
    "hd95_mm": Metric("HD95 [mm]", 2, False),
    "surface_dice": Metric("Surface Dice", 3, True),
    "volume_error_ml": Metric("Absolute volume error [ml]", 2, False),
}
"""The metrics that are averaged and compared, by their name in the table of scores."""


@dataclass(frozen=True)
class FoldCompute:
    """What the training of one fold took; None where it was not recorded."""

    fold: int
    seconds: float | None  # of training, without validation and without work that an interruption lost
    peak_memory_mib: float | None
    peak_memory_of: str  # GPU allocations, or the process
    device: str
    iterations: int | None  # optimizer steps
    epochs: int | None  # of nnU-Net's loop
    parameters: int | None
    trainable_parameters: int | None
    checkpoint_bytes: int  # of checkpoint_final.pth
    resumed: int  # how often the training continued after an interruption
    git_hash: str | None  # of this package's checkout; several with "then" between them
    wall_seconds: float | None = None  # from each start to the validation or the interruption, loading included
    versions: Mapping[str, str] = field(default_factory=dict)  # of packages; several with "then" between them


@dataclass(frozen=True)
class Row:
    """One row of the tables: a method, an ensemble of methods, or one of these with nnU-Net's post-processing."""

    name: str  # for people, unique; the column ``method`` of the table of scores
    kind: Kind
    members: tuple[ModelName, ...]  # the trained methods
    predictions: Path  # folder of the scored label maps, one file for each case


@dataclass(frozen=True)
class Finding:
    """Something that bears on fairness; a severe one must be accepted by the user and opens the report."""

    severe: bool
    text: str


@dataclass(frozen=True)
class BenchmarkResults:
    """Everything that a benchmark's report shows."""

    dataset: str  # full name
    dataset_json: Mapping[str, object]
    configuration: str
    cases: Mapping[int, tuple[str, ...]]  # validation cases by fold
    tolerance_mm: float  # of the surface Dice
    rows: tuple[Row, ...]  # in the order of the tables
    scores: pd.DataFrame  # the long table, see this module's docstring
    means: pd.DataFrame  # see statistics.summarise
    comparisons: pd.DataFrame  # see statistics.compare
    test_set: pd.DataFrame  # method, case, class, metric, value; empty without labelled test cases
    compute: Mapping[str, tuple[FoldCompute, ...]]  # by method, one entry for each fold
    histories: Mapping[str, Mapping[int, History]]  # nnU-Net's log by method and fold
    findings: tuple[Finding, ...]  # of the fairness checks
    best: str | None  # the row that nnUNetv2_find_best_configuration chose
    policies: Mapping[str, str]  # what each score means
    versions: Mapping[str, str]  # of the packages that evaluated
    git_hash: str | None  # of this package's checkout, if it is one
    commands: tuple[str, ...]  # exactly what was run
    images: Path  # the raw dataset's imagesTr
    truths: Path  # folder of the true label maps
    notes: tuple[str, ...] = ()  # what a reader must know about this run before its numbers
    inside: tuple[Picture, ...] = ()  # how MaskSAM prompts itself on a case, if a MaskSAM was trained

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes, in nnU-Net's order."""
        return list(self.scores["class"].unique())

    @property
    def focus(self) -> Row:
        """The row that chooses the cases to show: the first MaskSAM, else the first row."""
        ours = (row for row in self.rows if row.kind == "method" and is_masksam(row.members[0]))
        return next(ours, self.rows[0])


def is_masksam(method: ModelName) -> bool:
    """Whether the method's trainer is one of MaskSAM's, by its name."""
    return "masksam" in method.trainer.lower()


_SHOWN = {"nnUNetTrainer_adamw_budget": "nnUNetTrainer, AdamW"}
"""Names of trainers that say more than the class's."""


def row_names(methods: Sequence[ModelName]) -> dict[ModelName, str]:
    """A short unique name for each method: its trainer, and its plans where they are needed to tell it apart."""
    trainers = Counter(method.trainer for method in methods)
    return {
        method: _SHOWN.get(method.trainer, method.trainer)
        if trainers[method.trainer] == 1 and method.plans == "nnUNetPlans"
        else f"{method.trainer} ({method.plans})"
        for method in methods
    }
