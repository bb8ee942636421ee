"""What a benchmark finds, in plain types: made by evaluation, read by statistics and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from masksam_nnunet.inference.methods import Method

if TYPE_CHECKING:  # a process that only waits for a training needs neither PyTorch nor MONAI
    from masksam_nnunet.inference.history import History
    from masksam_nnunet.inference.scoring import Scores

Kind = Literal["method", "ensemble", "postprocessed"]
Metric = Literal["dice", "hd95_mm", "surface_dice", "volume_error_ml"]


@dataclass(frozen=True)
class FoldCompute:
    """What the training of one fold took. None where it was not recorded."""

    fold: int
    seconds: float | None
    """Of training, without validation: of what the result comes from, so that work lost at a break does not count."""
    peak_memory_mib: float | None
    peak_memory_of: str
    """What was measured: GPU allocations, or the process."""
    device: str
    iterations: int | None
    epochs: int | None
    parameters: int | None
    trainable_parameters: int | None
    checkpoint_bytes: int
    """Of checkpoint_final.pth."""
    resumed: int
    """How often it was broken off and went on."""
    git_hash: str | None
    """Of this package's checkout, where it was one; several with ``then`` between them."""
    wall_seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """By the clock, from each start to the validation or the break: with loading, and with work that a break lost."""


@dataclass(frozen=True)
class Row:
    """One row of the tables: a method, an ensemble of methods, or one of these with nnU-Net's post-processing."""

    name: str
    """For people, unique."""
    kind: Kind
    members: tuple[Method, ...]
    scores: Scores
    """Of all cases of all folds, each predicted by the fold that has not seen it."""
    fold_of: Mapping[str, int]
    """The fold that validated a case."""
    compute: tuple[FoldCompute, ...]
    """By fold; of all members."""
    histories: Mapping[int, History]
    """nnU-Net's log by fold; empty for ensembles."""
    predictions: Path
    """The folder of the scored label maps, one file a case."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap 95 % interval; NaN where undefined."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Aggregate:
    """A metric of one row, averaged over the cases where it is defined."""

    row: str
    metric: Metric
    class_name: str | None
    """None: the mean over classes, within each case where it is defined."""
    mean: Interval
    median: float
    number: int
    """Cases where it is defined."""


@dataclass(frozen=True)
class Comparison:
    """Two rows on the same cases."""

    metric: Metric
    class_name: str | None
    """As in :class:`Aggregate`."""
    a: str
    b: str
    number: int
    """Cases where both are defined."""
    difference: Interval
    """Mean of a - b over these cases."""
    median_difference: float
    p: float
    """Wilcoxon's signed-rank test, two-sided; NaN where it cannot be made."""
    p_holm: float
    """Corrected by Holm over the classes of the same metric and pair of rows; for the mean over classes equal to p."""
    effect: float
    """Matched-pairs rank-biserial correlation, -1 to 1: positive where a is larger."""
    better: str | None
    """The row that is better at p_holm < 0.05, by what is better for this metric; None if neither."""
    only_a: int = 0
    """Cases left out because the metric is defined in ``a`` only; for the mean over classes, cases where a class is."""
    only_b: int = 0
    """The same for ``b``."""


@dataclass(frozen=True)
class Finding:
    """Something that bears on fairness."""

    severe: bool
    """A comparison with it is refused unless the user insists; it then opens the report."""
    text: str


@dataclass(frozen=True)
class TestSetScore:
    """Scores on the raw dataset's own test cases, predicted by all folds together."""

    name: str
    members: tuple[Method, ...]
    scores: Scores
    predictions: Path


@dataclass(frozen=True)
class BenchmarkResults:
    """All that a benchmark's report says."""

    dataset: str
    dataset_json: Mapping[str, object]
    configuration: str
    folds: tuple[int, ...]
    cases: Mapping[int, tuple[str, ...]]
    """Validation cases by fold."""
    rows: tuple[Row, ...]
    aggregates: tuple[Aggregate, ...]
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]
    test_set: tuple[TestSetScore, ...]
    best: str | None
    """What nnUNetv2_find_best_configuration chose, by the name of its row."""
    policies: Mapping[str, str]
    """What each score means, in words."""
    versions: Mapping[str, str]
    git_hash: str | None
    commands: tuple[str, ...]
    """Exactly what was run."""
    images: Path
    """The raw dataset's imagesTr, for pictures."""
    truths: Path
