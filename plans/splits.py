"""Folds that keep a patient's images together.

nnU-Net splits by case. Where one patient has several images (ACDC: ``patient001_frame01``, ``patient001_frame12``), a
split by case validates on patients seen in training.
"""

from __future__ import annotations

from collections.abc import Iterable

from nnunetv2.utilities.crossval_split import generate_crossval_split

NUM_FOLDS = 5
_SEED = 12345  # nnU-Net's own


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


def patient_folds(groups: dict[str, list[str]], num_folds: int = NUM_FOLDS) -> list[dict[str, list[str]]]:
    """The content of splits_final.json with every patient's cases on one side.

    Patients are drawn as nnU-Net draws cases, with its seed.

    Raises:
        ValueError: if there are fewer patients than folds.
    """
    if len(groups) < num_folds:
        raise ValueError(f"{num_folds} folds need at least {num_folds} patients, but the case names show {len(groups)}")
    by_patient = generate_crossval_split(sorted(groups), seed=_SEED, n_splits=num_folds)
    # nnU-Net's function returns numpy strings, which are not plain JSON in every version.
    return [
        {part: [case for p in fold[part] for case in groups[str(p)]] for part in ("train", "val")}
        for fold in by_patient
    ]
