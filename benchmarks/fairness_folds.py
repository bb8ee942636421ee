"""Whether every method's folds are trained, and validated on the cases of the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.scoring import cases_in

from .errors import listed
from .fold_state import Stage, fold_state
from .names import row_names
from .results import Finding, Method


def check_folds(
    methods: Sequence[Method], folds: Sequence[int], results: Path, splits: Any, file_ending: str
) -> list[Finding]:
    """Check all folds of all methods.

    Args:
        methods: to be compared.
        folds: to be compared.
        results: the dataset's folder in nnUNet_results.
        splits: the content of splits_final.json, which has these folds.
        file_ending: of label maps.

    Raises:
        BenchmarkError: listing the folds that are not trained, and those whose validation lacks cases.
    """
    names = row_names(methods)
    findings, refused = [], []
    for method in methods:
        for fold in folds:
            where = f"{names[method]}, fold {fold}"
            folder = results / method.key / f"fold_{fold}"
            wanted = splits[fold]["val"]
            state = fold_state(folder, wanted, file_ending, npz=False)
            there = cases_in(folder / "validation", file_ending)
            missing, extra = set(wanted) - set(there), set(there) - set(wanted)
            others = f"; it has predictions of other cases: {listed(extra)}" if extra else ""
            if state.stage in (Stage.MISSING, Stage.BROKEN_OFF):
                refused.append(f"{where} is not trained to its end: {state.reason} in {folder}")
            elif missing:
                refused.append(f"{where} lacks predictions of its validation cases {listed(missing)}{others}")
            elif state.stage is Stage.TRAINED:
                refused.append(f"{where} is not validated: {state.reason}")
            elif extra:
                findings.append(
                    Finding(
                        True,
                        f"{where}, has predictions of cases that splits_final.json does not validate there, as if it "
                        f"had been trained with other splits: {listed(extra)}.",
                    )
                )
            if state.stage is Stage.DAMAGED:
                findings.append(Finding(True, f"The checkpoint of {where}, is damaged: {state.reason}."))
    if refused:
        raise BenchmarkError(
            "these folds cannot be compared:\n"
            + "\n".join(f"- {line}" for line in refused)
            + "\nRun masksam benchmark to train and validate what is missing; if splits were changed, restore "
            "those that the folds were trained with."
        )
    return findings
