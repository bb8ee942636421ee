"""A dataset of empty files in folders of nnU-Net's, for commands that train nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from plain_plans import dataset_json, plain_plans

DATASET = "Dataset004_Small"


def place_dataset(root: Path, monkeypatch: pytest.MonkeyPatch, cases: Sequence[str]) -> Path:
    """Place a planned and preprocessed dataset of empty files; returns its folder in nnUNet_preprocessed."""
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    description = dataset_json() | {"file_ending": ".nii.gz", "numTraining": len(cases)}
    plans = plain_plans() | {"dataset_name": DATASET}
    data = preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
    for folder in (raw / "imagesTr", raw / "labelsTr", data):
        folder.mkdir(parents=True)
    for case in cases:
        for channel in range(len(description["channel_names"])):
            (raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"{case}{ending}").touch()
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return preprocessed
