"""Folds that keep a patient's images together: ``masksam split``, and checks of splits.

nnU-Net splits by case. Where one patient has several images (ACDC: ``patient001_frame01``, ``patient001_frame12``), a
split by case validates on patients seen in training.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nnunetv2.utilities.crossval_split import generate_crossval_split
from pydantic import BaseModel, Field, TypeAdapter

from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import read_json, write_json

from .raw_data import NUM_FOLDS, datasets_in, read_raw_dataset

SPLITS_FILE = "splits_final.json"
SEED = 12345
"""nnU-Net's own."""
BY_CASE = ".+"
"""The expression by which each case is a patient of its own: names may begin with centres or scanners."""

Fold = dict[str, list[str]]
"""The cases of ``train`` and ``val``."""


class _FileFold(BaseModel):
    train: Annotated[list[str], Field(min_length=1)]
    val: list[str]


_FILE = TypeAdapter(Annotated[list[_FileFold], Field(min_length=1)])


@dataclass(frozen=True)
class Split:
    """The splits_final.json that :func:`split_dataset` wrote, and its folds."""

    path: Path
    written: bool
    """False if the file had this content already."""
    folds: list[Fold]
    patients: dict[str, str]
    """The patient of each case."""
    notes: list[str]


def patient_of(case: str) -> str:
    """The part of a case's name before its last ``_`` or ``-``; the whole name where there is neither."""
    return re.sub(r"(?<=.)[_-][^_-]*$", "", case)


def group_by_patient(cases: Iterable[str]) -> dict[str, list[str]] | None:
    """Cases of each patient, sorted, or None where the names do not tell patients apart.

    Names tell patients apart if at least two different prefixes hold a number (``patient007_ED``), not only the name
    of the data set (``hippocampus_007``), and one of these is shared by several cases.
    """
    groups = _grouped(cases, patient_of)
    numbered = [prefix for prefix in groups if any(c.isdigit() for c in prefix)]
    shared = any(len(groups[prefix]) > 1 for prefix in numbered)
    return groups if shared and len(numbered) >= 2 else None


def group_by_regex(cases: Iterable[str], regex: str) -> dict[str, list[str]]:
    """Cases of each patient, sorted, where ``regex`` finds the patient in a case's name.

    The patient is the group named ``patient``, else all groups joined by ``_``, else, without groups, the whole match.
    The expression may match anywhere in the name.

    Raises:
        DataError: it is not a regular expression, finds nothing in some names, or groups nothing or everything and is
            not :data:`BY_CASE`.
    """
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise DataError(f"--group '{regex}' is not a regular expression: {error}") from error
    groups = _grouped(cases, lambda case: _matched_patient(pattern.search(case)))
    number = sum(map(len, groups.values()))
    if "" in groups:
        unmatched = groups[""]
        raise DataError(f"--group '{regex}' finds no patient in {len(unmatched)} of {number} cases: {_some(unmatched)}")
    if len(groups) in (1, number) and regex != BY_CASE:
        raise DataError(
            f"--group '{regex}' finds {len(groups)} patients in {number} cases, such as {_some(list(groups))}; capture "
            "the part that a patient's cases share and others' do not"
        )
    return groups


def patient_folds(groups: Mapping[str, Sequence[str]], num_folds: int = NUM_FOLDS, seed: int = SEED) -> list[Fold]:
    """The content of splits_final.json with every patient's cases on one side.

    Patients are drawn as nnU-Net draws cases, by default with its seed. Fewer patients than folds are a DataError.
    """
    if len(groups) < num_folds:
        raise DataError(f"--folds {num_folds}: there are only {len(groups)} patients; lower it or correct --group")
    by_patient = generate_crossval_split(sorted(groups), seed=seed, n_splits=num_folds)
    # nnU-Net's function returns numpy strings, which are not plain JSON in every version.
    return [
        {part: [case for p in fold[part] for case in groups[str(p)]] for part in ("train", "val")}
        for fold in by_patient
    ]


def read_splits(path: Path, cases: Iterable[str] | None = None) -> list[Fold]:
    """The folds in a splits_final.json; ``cases`` are the names of all training cases, None to allow any.

    Raises:
        DataError: it cannot be read, is not a list of folds, names unknown cases, or a fold trains on no case.
    """
    try:
        splits: list[Fold] = read_json(path)
        _FILE.validate_python(splits)
        named = {case for fold in splits for part in ("train", "val") for case in fold[part]}
        if cases is not None and (unknown := sorted(named - set(cases))):
            raise ValueError(f"it names unknown cases: {_some(unknown)}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be used ({in_short(error)}); write it again with masksam split, or remove it"
        ) from error
    return splits


def overlaps(splits: Sequence[Mapping[str, Iterable[str]]]) -> list[str]:
    """A sentence for each way in which the folds overlap."""
    found = []
    for number, fold in enumerate(splits):
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both:
            found.append(f"fold {number} validates cases that it trains on: {_some(both)}")
    times = Counter(case for fold in splits for case in set(fold["val"]))
    twice = sorted(case for case, count in times.items() if count > 1)
    if twice:
        found.append(f"several folds validate the same cases: {_some(twice)}")
    return found


def split_warning(
    cases: Iterable[str], splits: Sequence[Mapping[str, Iterable[str]]] | None, dataset: int | str = "ID"
) -> str | None:
    """A sentence for the user if names suggest that training and validation share patients, else None.

    Args:
        cases: names of all training cases.
        splits: the content of splits_final.json; None where there is none and nnU-Net will split by case.
        dataset: the dataset's number for the suggested command.
    """
    cases = list(cases)
    groups = group_by_patient(cases)
    if groups is None:
        return None
    # The short expression where it finds in every name what patient_of does.
    regex = "(.+)[_-]" if all(patient_of(case) != case for case in cases) else "^(.+?)(?:[_-][^_-]*)?$"
    remedy = (
        f"if names begin with centres, masksam split and benchmark take --group '{BY_CASE}', else write a split by "
        f"patient with: masksam split -d {dataset} --group '{regex}'"
    )
    if splits is None:
        example = next(members for members in groups.values() if len(members) > 1)
        return f"patients seem to have several cases ({_some(example)}), but nnU-Net splits by case; {remedy}"
    for number, fold in enumerate(splits):
        train = {patient_of(case): case for case in sorted(fold["train"])}
        both = [f"{train[patient_of(case)]} and {case}" for case in sorted(fold["val"]) if patient_of(case) in train]
        if both:
            return f"{SPLITS_FILE} seems to train and validate on one patient: fold {number} on {both[0]}; {remedy}"
    return None


def split_dataset(dataset: str, regex: str, *, folds: int = NUM_FOLDS, seed: int = SEED, force: bool = False) -> Split:
    """Write ``nnUNet_preprocessed/DatasetXXX_Name/splits_final.json`` with each patient's cases on one side.

    Args:
        dataset: number or name of one in nnUNet_raw or, with gt_segmentations, in nnUNet_preprocessed.
        regex: finds the patient in a case's name, see :func:`group_by_regex`.
        folds, seed: number of folds, and of the random draw.
        force: replace a file with other content.

    Raises:
        DataError: unknown dataset, an expression that does not group, fewer patients than folds, or another split
            exists.
    """
    if not os.environ.get("nnUNet_preprocessed"):
        raise DataError("nnUNet_preprocessed is not set: nnU-Net reads splits_final.json there; export it first")
    roots = [Path(os.environ[v]) for v in ("nnUNet_preprocessed", "nnUNet_raw") if os.environ.get(v)]
    names = {name for root in roots for name in datasets_in(root, dataset)}
    if len(names) != 1:
        places = " or ".join(map(str, roots))
        raise DataError(f"-d {dataset} must be one dataset in {places}; there are {sorted(names)}")
    # nnU-Net's planner stops where the raw dataset holds another split.
    path, *raw_path = (root / name / SPLITS_FILE for root in roots for name in names)
    groups = group_by_regex(_cases(path.parent, *(file.parent for file in raw_path)), regex)
    splits = patient_folds(groups, folds, seed)

    others = [file for file in (path, *raw_path) if file.is_file() and not _holds(file, splits)]
    if path in others and not force:
        raise DataError(f"{path} holds another split; replace it with --force if you train all folds with the new one")
    to_write = ([] if path.is_file() else [path]) + (others if force else [])
    for file in to_write:
        try:
            write_json(file, splits)
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror or error}") from error
    notes = []
    if folds < NUM_FOLDS:
        notes.append(f"there are folds 0 to {folds - 1} only: for others nnU-Net makes a random split by case")
    if others and not force:
        notes.append(f"{others[0]} holds another split, at which nnU-Net's planning stops; --force replaces it too")
    patients = {case: patient for patient, cases in groups.items() for case in cases}
    return Split(path, bool(to_write), splits, patients, notes)


def _grouped(cases: Iterable[str], patient: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(patient(case), []).append(case)
    return groups


def _matched_patient(match: re.Match[str] | None) -> str:
    """The patient that a match names, empty if none."""
    if match is None:
        return ""
    if "patient" in match.re.groupindex:
        return match["patient"] or ""
    return "_".join(filter(None, match.groups())) if match.re.groups else match[0]


def _cases(preprocessed: Path, raw: Path | None = None) -> list[str]:
    """Names of the training cases, from the raw dataset or else from the preprocessed one."""
    if raw is not None and raw.is_dir():
        return list(read_raw_dataset(raw, "-d", min_cases=1).images)
    try:
        ending = read_json(preprocessed / "dataset.json")["file_ending"]
        files = (preprocessed / "gt_segmentations").glob(f"[!.]*{ending}")
        return [path.name.removesuffix(ending) for path in files]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{preprocessed} is damaged ({in_short(error)}); preprocess the dataset again") from error


def _holds(path: Path, splits: list[Fold]) -> bool:
    """Whether the file holds these folds."""
    try:
        return unordered(read_json(path)) == unordered(splits)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def unordered(splits: list[Fold]) -> list[Fold]:
    """Folds without the order of cases, which nnU-Net ignores."""
    return [{part: sorted(fold[part]) for part in ("train", "val")} for fold in splits]


def _some(names: Sequence[str], number: int = 3) -> str:
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")
