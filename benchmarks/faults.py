"""Which file of which fold is at fault, where nnU-Net's functions say only that something is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masksam_nnunet.inference.label_maps import LabelMapError
from masksam_nnunet.inference.scoring import read_pair

from .results import Method


def faulty_prediction(
    methods: Sequence[Method],
    cases: Mapping[int, Sequence[str]],
    results: Path,
    truths: Path,
    dataset_json: Mapping[str, Any],
) -> str | None:
    """The first validated label map that is not whole or not on its truth's grid, with the remedy; None: all are.

    It reads them all, so that it is for when something has gone wrong.

    Args:
        methods: of the benchmark.
        cases: validation cases by fold.
        results: the dataset's folder in nnUNet_results.
        truths: gt_segmentations.
        dataset_json: the dataset's description.
    """
    for method in methods:
        for fold, names in cases.items():
            validation = results / method.key / f"fold_{fold}" / "validation"
            for case in names:
                try:
                    read_pair(validation, truths, dataset_json, case)
                except LabelMapError as error:
                    file = validation / (case + dataset_json["file_ending"])
                    return (
                        f"{error}. If the truth is right, remove {file} and run masksam benchmark again, which "
                        "validates that fold anew; its training is kept"
                    )
    return None
