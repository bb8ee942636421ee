"""``masksam split``: write the splits_final.json that keeps a patient's cases together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_json

from ..raw_data import read_raw_dataset
from ..splits import NUM_FOLDS, SEED, group_by_regex, patient_folds

_FILE = "splits_final.json"


@dataclass(frozen=True)
class FoldSize:
    """Patients and cases on both sides of a fold."""

    train_patients: int
    train_cases: int
    val_patients: int
    val_cases: int


@dataclass(frozen=True)
class SplitReport:
    """What ``split_dataset`` did.

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


def split_dataset(
    dataset_id: int, regex: str, *, folds: int = NUM_FOLDS, seed: int = SEED, force: bool = False
) -> SplitReport:
    """Write ``nnUNet_preprocessed/DatasetXXX_Name/splits_final.json`` with each patient's cases on one side.

    Args:
        dataset_id: a dataset in nnUNet_raw or, with gt_segmentations, in nnUNet_preprocessed.
        regex: finds the patient in a case's name, see ``group_by_regex``.
        folds: their number.
        seed: of the random draw.
        force: replace a file with other content.

    Raises:
        DataError: unknown dataset, an expression that does not group, fewer patients than folds, or another split
            is there already.
    """
    preprocessed = _folder("nnUNet_preprocessed")
    if preprocessed is None:
        raise DataError("nnUNet_preprocessed not set: nnU-Net reads splits_final.json there; export it first")
    raw = _folder("nnUNet_raw")
    name = _dataset_name(dataset_id, [folder for folder in (raw, preprocessed) if folder is not None])
    groups = group_by_regex(_cases(name, raw, preprocessed), regex)
    try:
        splits = patient_folds(groups, folds, seed)
    except ValueError as error:
        raise DataError(f"--group '{regex}': {error}; lower --folds or correct --group") from error

    path = preprocessed / name / _FILE
    existing = _existing(path)
    same = _canonical(existing) == _canonical(splits)
    if existing is not None and not same and not force:
        raise DataError(
            f"{path} holds another split, nothing was changed: folds trained on it and folds trained on a new one "
            "would validate on each other's training cases; replace it with --force if nothing is trained yet or all "
            "folds will be trained again"
        )
    own = raw / name / _FILE if raw is not None else None
    # nnU-Net's planner stops where the raw dataset's file differs.
    wanted = [] if same else [path]
    if own is not None and own.is_file() and force and _canonical(_existing(own)) != _canonical(splits):
        wanted.append(own)
    for file in wanted:
        try:
            write_json(file, splits)
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror or error}") from error
    return SplitReport(path, bool(wanted), tuple(_sizes(groups, splits)), tuple(_notes(raw, name, splits)))


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def _dataset_name(dataset_id: int, folders: Sequence[Path]) -> str:
    known = sorted({p.name for folder in folders for p in folder.glob("Dataset[0-9][0-9][0-9]_*") if p.is_dir()})
    names = [name for name in known if name.startswith(f"Dataset{dataset_id:03d}_")]
    if not names:
        raise DataError(
            f"-d {dataset_id}: no such dataset in {' or '.join(map(str, folders))}; "
            + (f"there are {', '.join(known)}" if known else "there is none; make one with masksam convert")
        )
    if len(names) > 1:
        raise DataError(f"-d {dataset_id} names several datasets: {', '.join(names)}; give each a number of its own")
    return names[0]


def _cases(name: str, raw: Path | None, preprocessed: Path) -> list[str]:
    """Names of the training cases, from the raw dataset or else from the preprocessed one."""
    if raw is not None and (raw / name).is_dir():
        return list(read_raw_dataset(raw / name, "-d", min_cases=1).images)
    folder = preprocessed / name
    try:
        ending = read_json(folder / "dataset.json")["file_ending"]
        files = [path.name for path in (folder / "gt_segmentations").iterdir() if path.name[0] != "."]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"the cases of {folder} cannot be listed: {error}; give the raw dataset a place in nnUNet_raw, or "
            "preprocess it again, which writes dataset.json and gt_segmentations"
        ) from error
    cases = [file.removesuffix(ending) for file in files if file.endswith(ending)]
    if not cases:
        raise DataError(f"{folder / 'gt_segmentations'} holds no training case *{ending}; preprocess the dataset again")
    return cases


def _existing(path: Path) -> Any:
    """The split that is there, None where there is none, a text where it cannot be read."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"


def _canonical(splits: Any) -> Any:
    """A split without its order, which nnU-Net does not look at; other things as they are."""
    try:
        return [{part: sorted(fold[part]) for part in ("train", "val")} for fold in splits]
    except (LookupError, TypeError):
        return splits


def _sizes(groups: dict[str, list[str]], splits: list[dict[str, list[str]]]) -> list[FoldSize]:
    patient = {case: name for name, cases in groups.items() for case in cases}
    return [
        FoldSize(
            len({patient[case] for case in fold["train"]}),
            len(fold["train"]),
            len({patient[case] for case in fold["val"]}),
            len(fold["val"]),
        )
        for fold in splits
    ]


def _notes(raw: Path | None, name: str, splits: list[dict[str, list[str]]]) -> list[str]:
    notes = []
    if len(splits) < NUM_FOLDS:
        notes.append(
            f"{len(splits)} folds, 0 to {len(splits) - 1}: for a fold that is not in the file, nnU-Net silently makes "
            "a random split by case"
        )
    theirs = _existing(raw / name / _FILE) if raw is not None else None
    if raw is not None and theirs is not None and _canonical(theirs) != _canonical(splits):
        notes.append(
            f"{raw / name / _FILE} holds another split, on which nnU-Net's planning stops with an AssertionError; "
            "--force replaces it too"
        )
    return notes
