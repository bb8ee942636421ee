"""Folds that keep a patient's images together: ``masksam split``, and checks of splits.

nnU-Net splits by case. Where one patient has several images (ACDC: ``patient001_frame01``, ``patient001_frame12``), a
split by case validates on patients seen in training.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_json

from .raw_data import NUM_FOLDS, read_raw_dataset

SPLITS_FILE = "splits_final.json"
SEED = 12345
"""nnU-Net's own."""

Fold = dict[str, list[str]]
"""The cases of ``train`` and ``val``."""


@dataclass(frozen=True)
class FoldSize:
    """Patients and cases on both sides of a fold."""

    train_patients: int
    train_cases: int
    val_patients: int
    val_cases: int


@dataclass(frozen=True)
class SplitReport:
    """What :func:`split_dataset` did.

    Attributes:
        path: the splits_final.json.
        written: False if it had this content already.
        folds: their sizes.
        notes: what the user should know.
    """

    path: Path
    written: bool
    folds: tuple[FoldSize, ...]
    notes: tuple[str, ...]


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
        DataError: it is not a regular expression, finds nothing in some names, or groups nothing or everything.
    """
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise DataError(f"--group '{regex}' is not a regular expression: {error}") from error
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(_matched_patient(pattern.search(case)), []).append(case)
    number = sum(map(len, groups.values()))
    unmatched = groups.get("", [])
    if unmatched:
        raise DataError(
            f"--group '{regex}' finds no patient in {len(unmatched)} of {number} cases: {_some(unmatched)}; it must "
            "match the patient's part of every name"
        )
    if len(groups) == number:
        raise DataError(
            f"--group '{regex}' finds another patient in each of the {number} cases, such as {_some(list(groups))}; "
            "capture only the part that a patient's cases share"
        )
    if len(groups) == 1:
        raise DataError(
            f"--group '{regex}' finds one patient, {next(iter(groups))!r}, in all {number} cases; capture the part "
            "that differs"
        )
    return groups


def patient_folds(groups: Mapping[str, Sequence[str]], num_folds: int = NUM_FOLDS, seed: int = SEED) -> list[Fold]:
    """The content of splits_final.json with every patient's cases on one side.

    Patients are drawn as nnU-Net draws cases, by default with its seed.

    Raises:
        ValueError: there are fewer patients than folds.
    """
    if len(groups) < num_folds:
        raise ValueError(f"{num_folds} folds need at least {num_folds} patients, the case names show {len(groups)}")
    by_patient = generate_crossval_split(sorted(groups), seed=seed, n_splits=num_folds)
    # nnU-Net's function returns numpy strings, which are not plain JSON in every version.
    return [
        {part: [case for p in fold[part] for case in groups[str(p)]] for part in ("train", "val")}
        for fold in by_patient
    ]


def read_splits(path: Path, cases: Iterable[str]) -> list[Fold]:
    """The folds in a splits_final.json.

    Args:
        path: the file.
        cases: names of all training cases.

    Raises:
        DataError: it cannot be read, is not a list of folds, or names unknown cases.
    """
    remedy = "write it again with masksam split, or remove it: nnU-Net then splits by case"
    try:
        splits = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; {remedy}") from error
    if not isinstance(splits, list) or not splits or not all(map(_is_fold, splits)):
        raise DataError(f'{path} is not a list of folds {{"train": [CASE, ...], "val": [CASE, ...]}}; {remedy}')
    known = set(cases)
    for number, fold in enumerate(splits):
        unknown = sorted({*fold["train"], *fold["val"]} - known)
        if unknown:
            raise DataError(f"{path}: fold {number} names unknown cases: {_some(unknown)}; {remedy}")
        if not fold["train"]:
            raise DataError(f"{path}: fold {number} trains on no case; {remedy}")
    result: list[Fold] = splits
    return result


def overlaps(splits: Sequence[Mapping[str, Iterable[str]]]) -> list[str]:
    """A sentence for each way in which the folds overlap."""
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
    remedy = f"write a split by patient with: masksam split -d {dataset} --group '{regex}'"
    if splits is None:
        example = next(members for members in groups.values() if len(members) > 1)
        return f"patients seem to have several cases ({_some(example)}), but nnU-Net splits by case; {remedy}"
    for fold, split in enumerate(splits):
        train = {patient_of(case): case for case in sorted(split["train"])}
        for case in sorted(split["val"]):
            if patient_of(case) in train:
                return (
                    f"{SPLITS_FILE} seems to separate cases of one patient: fold {fold} trains on "
                    f"{train[patient_of(case)]} and validates {case}; {remedy}"
                )
    return None


def split_dataset(
    dataset_id: int, regex: str, *, folds: int = NUM_FOLDS, seed: int = SEED, force: bool = False
) -> SplitReport:
    """Write ``nnUNet_preprocessed/DatasetXXX_Name/splits_final.json`` with each patient's cases on one side.

    Args:
        dataset_id: a dataset in nnUNet_raw or, with gt_segmentations, in nnUNet_preprocessed.
        regex: finds the patient in a case's name, see :func:`group_by_regex`.
        folds: their number.
        seed: seed of the random draw.
        force: replace a file with other content.

    Raises:
        DataError: unknown dataset, an expression that does not group, fewer patients than folds, or another split
            exists.
    """
    raw, preprocessed = (
        Path(os.environ[v]) if os.environ.get(v) else None for v in ("nnUNet_raw", "nnUNet_preprocessed")
    )
    if preprocessed is None:
        raise DataError("nnUNet_preprocessed is not set: nnU-Net reads splits_final.json there; export it first")
    name = _dataset_name(dataset_id, [folder for folder in (raw, preprocessed) if folder is not None])
    groups = group_by_regex(_cases(name, raw, preprocessed), regex)
    try:
        splits = patient_folds(groups, folds, seed)
    except ValueError as error:
        raise DataError(f"--group '{regex}': {error}; lower --folds or correct --group") from error

    path = preprocessed / name / SPLITS_FILE
    raw_path = raw / name / SPLITS_FILE if raw is not None else None
    existing = _content(path)
    same = _unordered(existing) == _unordered(splits)
    if existing is not None and not same and not force:
        raise DataError(
            f"{path} holds another split, with which folds may be trained already; replace it with --force if you "
            "train all folds with the new one"
        )
    wanted = [] if same else [path]
    # nnU-Net's planner stops where the raw dataset's file differs.
    raw_differs = raw_path is not None and _unordered(_content(raw_path)) not in (None, _unordered(splits))
    if raw_path is not None and raw_differs and force:
        wanted.append(raw_path)
    for file in wanted:
        try:
            write_json(file, splits)
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror or error}") from error
    notes = []
    if folds < NUM_FOLDS:
        notes.append(f"there are folds 0 to {folds - 1} only: for others nnU-Net makes a random split by case")
    if raw_differs and not force:
        notes.append(f"{raw_path} holds another split, at which nnU-Net's planning stops; --force replaces it too")
    return SplitReport(path, bool(wanted), tuple(_sizes(groups, splits)), tuple(notes))


def _is_fold(fold: object) -> bool:
    return isinstance(fold, dict) and all(
        isinstance(fold.get(part), list) and all(isinstance(case, str) for case in fold[part])
        for part in ("train", "val")
    )


def _matched_patient(match: re.Match[str] | None) -> str:
    """The patient that a match names, empty if none."""
    if match is None:
        return ""
    if "patient" in match.re.groupindex:
        return match["patient"] or ""
    return "_".join(filter(None, match.groups())) if match.re.groups else match[0]


def _dataset_name(dataset_id: int, folders: Sequence[Path]) -> str:
    known = sorted({p.name for folder in folders for p in folder.glob("Dataset[0-9][0-9][0-9]_*") if p.is_dir()})
    names = [name for name in known if name.startswith(f"Dataset{dataset_id:03d}_")]
    if len(names) != 1:
        raise DataError(
            f"-d {dataset_id} names {'no dataset' if not names else ', '.join(names)} in "
            f"{' or '.join(map(str, folders))}; there are {', '.join(known) or 'none'}"
        )
    return names[0]


def _cases(name: str, raw: Path | None, preprocessed: Path) -> list[str]:
    """Names of the training cases, from the raw dataset or else from the preprocessed one."""
    if raw is not None and (raw / name).is_dir():
        return list(read_raw_dataset(raw / name, "-d", min_cases=1).images)
    folder = preprocessed / name
    try:
        ending = read_json(folder / "dataset.json")["file_ending"]
        files = [path.name for path in (folder / "gt_segmentations").iterdir() if path.name[0] != "."]
        cases = [file.removesuffix(ending) for file in files if file.endswith(ending)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"the cases of {folder} cannot be listed ({error}); preprocess the dataset again") from error
    if not cases:
        raise DataError(f"{folder / 'gt_segmentations'} holds no training case *{ending}; preprocess the dataset again")
    return cases


def _content(path: Path) -> Any:
    """The content of a split file, None where there is none, a text where it cannot be read."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"


def _unordered(splits: Any) -> Any:
    """A split without its order, which nnU-Net ignores; other things as they are."""
    try:
        return [{part: sorted(fold[part]) for part in ("train", "val")} for fold in splits]
    except (LookupError, TypeError):
        return splits


def _sizes(groups: dict[str, list[str]], splits: list[Fold]) -> list[FoldSize]:
    patient = {case: name for name, cases in groups.items() for case in cases}
    patients = [{part: len({patient[case] for case in fold[part]}) for part in ("train", "val")} for fold in splits]
    return [
        FoldSize(count["train"], len(fold["train"]), count["val"], len(fold["val"]))
        for count, fold in zip(patients, splits, strict=True)
    ]


def _some(names: Sequence[str], number: int = 3) -> str:
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")
