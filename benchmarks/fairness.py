"""Whether methods may be compared: what must be the same is checked, what differs is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.scoring import cases_in

from .fairness_folds import check_folds
from .fairness_models import check_models
from .fairness_splits import check_splits
from .fairness_training import check_training
from .files import read_or_refuse
from .results import Finding, Method, Row


def check_fairness(
    methods: Sequence[Method],
    folds: Sequence[int],
    results_folder: Path,
    preprocessed_folder: Path,
    patients: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """Check that methods were trained and validated on the same terms.

    Args:
        methods: of one configuration, at least one.
        folds: to be compared.
        results_folder: the dataset's folder in nnUNet_results.
        preprocessed_folder: the dataset's folder in nnUNet_preprocessed.
        patients: patient by case; None where the case names are to tell.

    Returns:
        What bears on fairness, severe findings first.

    Raises:
        BenchmarkError: what cannot be scored at all: a fold that splits_final.json does not have, validation sets that
            overlap, a fold that is not trained or not validated, a file that is not readable.
    """
    if not methods:
        raise BenchmarkError("--trainers names no method: give at least one")
    results, preprocessed = Path(results_folder), Path(preprocessed_folder)
    description = read_or_refuse(preprocessed / "dataset.json", "run nnUNetv2_plan_and_preprocess")
    ending = str(description["file_ending"])
    truths = preprocessed / "gt_segmentations"
    training_cases = cases_in(truths, ending)
    if not training_cases:
        raise BenchmarkError(
            f"{truths} holds no label maps ending in {ending}; run nnUNetv2_preprocess, which copies them there"
        )
    splits = read_or_refuse(
        preprocessed / "splits_final.json", "write it with masksam split, or let nnUNetv2_train make it"
    )
    findings = [
        *check_splits(splits, folds, training_cases, preprocessed.name, patients),
        *check_folds(methods, folds, results, splits, ending),
        *check_models(methods, results, description),
        *check_training(methods, folds, results, preprocessed),
    ]
    return tuple(sorted(findings, key=lambda finding: not finding.severe))


def check_postprocessing(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """Post-processing must have been tried for all rows or for none."""
    treated = {row.members for row in rows if row.kind == "postprocessed"}
    raw = [row for row in rows if row.kind != "postprocessed"]
    without = [row.name for row in raw if row.members not in treated]
    if not treated or not without:
        return ()
    with_ = [row.name for row in raw if row.members in treated]
    text = (
        f"nnU-Net's post-processing was tried for {', '.join(with_)} but not for {', '.join(without)}: compare the "
        "rows without it."
    )
    return (Finding(False, text),)
