"""Folds that keep a patient's images together, and splits that do not.

nnU-Net splits by case. Where one patient has several images (ACDC: ``patient001_frame01``, ``patient001_frame12``), a
split by case validates on patients seen in training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json

NUM_FOLDS = 5
SEED = 12345
"""nnU-Net's own."""


def patient_of(case: str) -> str:
    """The part of a case's name before its last ``_`` or ``-``; the whole name where there is neither."""
    cut = max(case.rfind("_"), case.rfind("-"))
    return case[:cut] if cut > 0 else case


def group_by_patient(cases: Iterable[str]) -> dict[str, list[str]] | None:
    """Cases of each patient, sorted, or None where the names do not tell patients apart.

    Names tell patients apart if at least two different prefixes hold a number (``patient007_ED``), not only the name
    of the data set (``hippocampus_007``), and one of these is shared by several cases.
    """
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(patient_of(case), []).append(case)
    numbered = [prefix for prefix in groups if any(c.isdigit() for c in prefix)]
    shared = any(len(groups[prefix]) > 1 for prefix in numbered)
    return groups if shared and len(numbered) >= 2 else None


def group_by_regex(cases: Iterable[str], regex: str) -> dict[str, list[str]]:
    """Cases of each patient, sorted, where ``regex`` finds the patient in a case's name.

    The patient is the group named ``patient``, else all groups joined by ``_``, else, without groups, the whole match.
    The expression may match anywhere in the name.

    Raises:
        DataError: it is no regular expression, finds nothing in some names, groups nothing or everything.
    """
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise DataError(f"--group '{regex}' is not a regular expression: {error}") from error
    groups: dict[str, list[str]] = {}
    unmatched: list[str] = []
    for case in sorted(cases):
        if patient := _matched_patient(pattern.search(case)):
            groups.setdefault(patient, []).append(case)
        else:
            unmatched.append(case)
    number = sum(map(len, groups.values())) + len(unmatched)
    if unmatched:
        raise DataError(
            f"--group '{regex}' finds no patient in {len(unmatched)} of {number} cases: {_some(unmatched)}; "
            "it must match the part of every name that tells the patient"
        )
    if len(groups) == number:
        raise DataError(
            f"--group '{regex}' groups nothing: each of the {number} cases is a patient of its own, such as "
            f"{_some(list(groups))}; capture only the part that a patient's cases share, or, if each case is another "
            "patient, leave the split to nnU-Net"
        )
    if len(groups) == 1:
        raise DataError(
            f"--group '{regex}' groups everything: all {number} cases belong to {next(iter(groups))!r}; capture the "
            f"part that differs between patients, in names such as {_some(next(iter(groups.values())))}"
        )
    return groups


def patient_folds(
    groups: Mapping[str, Sequence[str]], num_folds: int = NUM_FOLDS, seed: int = SEED
) -> list[dict[str, list[str]]]:
    """The content of splits_final.json with every patient's cases on one side.

    Patients are drawn as nnU-Net draws cases, by default with its seed.

    Raises:
        ValueError: if there are fewer patients than folds.
    """
    if len(groups) < num_folds:
        raise ValueError(f"{num_folds} folds need at least {num_folds} patients, but the case names show {len(groups)}")
    by_patient = generate_crossval_split(sorted(groups), seed=seed, n_splits=num_folds)
    # nnU-Net's function returns numpy strings, which are not plain JSON in every version.
    return [
        {part: [case for p in fold[part] for case in groups[str(p)]] for part in ("train", "val")}
        for fold in by_patient
    ]


def read_splits(path: Path, cases: Iterable[str]) -> list[dict[str, list[str]]]:
    """The folds in a splits_final.json.

    Args:
        path: of the file.
        cases: names of all training cases.

    Raises:
        DataError: it cannot be read, is not a list of folds, or names cases that are not there.
    """
    remedy = "write it again with masksam split, or remove it: nnU-Net then splits by case"
    try:
        splits = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; {remedy}") from error
    if not isinstance(splits, list) or not splits or not all(_is_fold(fold) for fold in splits):
        raise DataError(f'{path} is not a list of folds {{"train": [CASE, ...], "val": [CASE, ...]}}; {remedy}')
    known = set(cases)
    for number, fold in enumerate(splits):
        unknown = sorted({*fold["train"], *fold["val"]} - known)
        if unknown:
            raise DataError(
                f"{path}: fold {number} names {len(unknown)} cases that the dataset does not have: {_some(unknown)}; "
                f"{remedy}"
            )
        if not fold["train"]:
            raise DataError(f"{path}: fold {number} trains on no case; {remedy}")
    result: list[dict[str, list[str]]] = splits
    return result


def overlaps(splits: Sequence[Mapping[str, Iterable[str]]]) -> list[str]:
    """A sentence for each way in which folds are not a cross-validation."""
    found = []
    times = Counter(case for fold in splits for case in set(fold["val"]))
    for number, fold in enumerate(splits):
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both:
            found.append(f"fold {number} validates cases that it trains on: {_some(both)}")
    twice = sorted(case for case, count in times.items() if count > 1)
    if twice:
        found.append(f"several folds validate the same cases: {_some(twice)}")
    return found


def _is_fold(fold: object) -> bool:
    return isinstance(fold, dict) and all(
        isinstance(fold.get(part), list) and all(isinstance(case, str) for case in fold[part])
        for part in ("train", "val")
    )


def split_warning(
    cases: Iterable[str], splits: Sequence[Mapping[str, Iterable[str]]] | None, dataset: int | str = "ID"
) -> str | None:
    """A sentence for the user if names suggest that training and validation share patients, else None.

    Args:
        cases: names of all training cases.
        splits: the content of splits_final.json; None where there is none and nnU-Net will split by case.
        dataset: the number to name in the command that corrects it.
    """
    cases = list(cases)
    groups = group_by_patient(cases)
    if groups is None:
        return None
    remedy = f"write one by patient with: masksam split -d {dataset} --group '{_suggested_regex(cases)}'"
    if splits is None:
        example = next(members for members in groups.values() if len(members) > 1)
        return (
            f"case names suggest that patients have several cases ({_some(example)}), and without splits_final.json "
            f"nnU-Net splits by case, so that it validates on patients seen in training; {remedy}"
        )
    for fold, split in enumerate(splits):
        train = {patient_of(case): case for case in sorted(split["train"])}
        for case in sorted(split["val"]):
            if patient_of(case) in train:
                return (
                    f"splits_final.json seems to separate cases of one patient: in fold {fold}, "
                    f"{train[patient_of(case)]} is for training and {case} for validation; {remedy}"
                )
    return None


def _matched_patient(match: re.Match[str] | None) -> str:
    """The patient that a match names, empty if none."""
    if match is None:
        return ""
    if "patient" in match.re.groupindex:
        return match["patient"] or ""
    return "_".join(filter(None, match.groups())) if match.re.groups else match[0]


def _suggested_regex(cases: Iterable[str]) -> str:
    """An expression that finds in every name what ``patient_of`` does; the short one where that is enough."""
    if all(patient_of(case) != case for case in cases):
        return "(.+)[_-]"
    return "^(.+?)(?:[_-][^_-]*)?$"


def _some(names: Sequence[str], number: int = 3) -> str:
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")
