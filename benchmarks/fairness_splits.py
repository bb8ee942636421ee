"""Whether splits_final.json makes a cross-validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.plans.raw_data import number_of
from masksam_nnunet.plans.splits import NUM_FOLDS, split_warning

from .errors import listed
from .results import Finding

Split = Mapping[str, Sequence[str]]


def check_splits(
    splits: object,
    folds: Sequence[int],
    training_cases: Sequence[str],
    dataset: str,
    patients: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Check the folds to be compared.

    Args:
        splits: the content of splits_final.json.
        folds: to be compared.
        training_cases: all cases with a true label map.
        dataset: full name.
        patients: patient by case; None where the case names are to tell.

    Raises:
        BenchmarkError: the file is no list of folds; a fold is not in it, asked for twice, validates nothing, or cases
            without truth; folds validate the same case.
    """
    chosen = chosen_splits(splits, folds)
    assert isinstance(splits, list)
    known = set(training_cases)
    for fold, split in chosen.items():
        unknown = set(split["val"]) - known
        if unknown:
            raise BenchmarkError(
                f"fold {fold} of splits_final.json validates cases that have no true label map in gt_segmentations: "
                f"{listed(unknown)}; preprocess the dataset that these splits belong to"
            )
    times = Counter(case for split in chosen.values() for case in split["val"])
    twice = [case for case, number in times.items() if number > 1]
    if twice:
        raise BenchmarkError(
            f"splits_final.json validates cases more than once: {listed(twice)}; folds of a cross-validation must be "
            "disjoint: write them anew with masksam split, and train again"
        )
    findings = []
    for fold, split in chosen.items():
        seen = set(split["train"]) & set(split["val"])
        if seen:
            findings.append(Finding(True, f"Fold {fold} validates cases that it was trained on: {listed(seen)}."))
    left_out = known - times.keys()
    if len(chosen) == len(splits):
        if left_out:
            findings.append(
                Finding(True, f"No fold of splits_final.json validates these training cases: {listed(left_out)}.")
            )
        if len(splits) != NUM_FOLDS:
            findings.append(Finding(False, f"The cross-validation has {len(splits)} folds, not {NUM_FOLDS}."))
    else:
        findings.append(
            Finding(
                False,
                f"Only fold{'s' if len(chosen) > 1 else ''} {', '.join(map(str, sorted(chosen)))} of {len(splits)} "
                f"were compared: {len(times)} of {len(known)} cases.",
            )
        )
    if patients is not None:
        return findings + _separated(chosen, patients)
    # Folds that are not compared keep their place, so that the sentence counts them right.
    compared = [splits[i] if i in chosen else {"train": [], "val": []} for i in range(len(splits))]
    warning = split_warning(training_cases, compared, number_of(dataset))
    if warning is not None:
        findings.append(Finding(True, f"Patients are not kept together: {warning}."))
    return findings


def _separated(chosen: Mapping[int, Split], patients: Mapping[str, str]) -> list[Finding]:
    """Patients with cases on both sides of a fold."""
    found = []
    for fold, split in chosen.items():
        train, val = ({patients[case] for case in split[part] if case in patients} for part in ("train", "val"))
        if train & val:
            found.append(Finding(True, f"Fold {fold} validates patients it was trained on: {listed(train & val)}."))
    return found


def chosen_splits(splits: object, folds: Sequence[int]) -> dict[int, Split]:
    """The folds to be compared, by number.

    Raises:
        BenchmarkError: the file is no list of folds; a fold is not in it, asked for twice, or validates nothing.
    """
    if not isinstance(splits, list) or not all(
        isinstance(split, dict) and isinstance(split.get("train"), list) and isinstance(split.get("val"), list)
        for split in splits
    ):
        raise BenchmarkError(
            "splits_final.json is not a list of folds with 'train' and 'val'; write it anew with masksam split"
        )
    if not folds or len(set(folds)) < len(folds):
        raise BenchmarkError(f"--folds {' '.join(map(str, folds))}: name each fold once, and at least one")
    missing = [fold for fold in folds if not 0 <= fold < len(splits)]
    if missing:
        raise BenchmarkError(
            f"--folds {' '.join(map(str, missing))}: splits_final.json has {len(splits)} folds, 0 to "
            f"{len(splits) - 1}; for others nnU-Net would draw a random split: name folds that are there, or write "
            "more with masksam split"
        )
    empty = [fold for fold in folds if not splits[fold]["val"]]
    if empty:
        raise BenchmarkError(
            f"--folds {' '.join(map(str, empty))}: splits_final.json has no validation cases there; name folds that "
            "have some"
        )
    return {fold: splits[fold] for fold in folds}
