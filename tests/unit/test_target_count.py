"""The most targets of a slice, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from plain_plans import dataset_json, region_dataset_json

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.raw_check import TargetCount, count_targets
from masksam_nnunet.plans.raw_data import RawDataset


def write(path: Path, labels: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
    return path


@pytest.fixture
def labels() -> np.ndarray:
    """(3, 4, 5): slice 1 along the first axis holds 0, 1 and 2; column 4 of the last axis 0, 1, 2 and 3."""
    volume = np.zeros((3, 4, 5), np.uint8)
    volume[1, 0, 0], volume[1, 1, 4] = 1, 2
    volume[0, 0, 4], volume[2, 0, 4] = 1, 3
    return volume


def count(tmp_path: Path, labels: np.ndarray, description: dict[str, Any], axis: int = 0) -> TargetCount:
    files = {
        "empty": write(tmp_path / "empty.nii.gz", np.zeros((2, 4, 5), np.uint8)),
        "full": write(tmp_path / "full.nii.gz", labels),
    }
    return count_targets(RawDataset(tmp_path, description, {}, files), axis)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_background_counts(tmp_path: Path, labels: np.ndarray, dtype: type) -> None:
    assert count(tmp_path, labels.astype(dtype), dataset_json(4)) == TargetCount(3, "full", 1, 2)


def test_the_slice_axis_is_the_planned_one(tmp_path: Path, labels: np.ndarray) -> None:
    assert count(tmp_path, labels, dataset_json(4), axis=2) == TargetCount(4, "full", 4, 2)


def test_the_ignore_label_is_no_target(tmp_path: Path, labels: np.ndarray) -> None:
    assert count(tmp_path, labels, dataset_json(3, ignore=True), axis=2).most == 3


def test_regions_are_counted_as_regions(tmp_path: Path, labels: np.ndarray) -> None:
    """whole = 1, 2, 3 and core = 2, 3; background is none."""
    assert count(tmp_path, labels, region_dataset_json()) == TargetCount(2, "full", 1, 2)
    assert count(tmp_path, np.zeros_like(labels), region_dataset_json()).most == 0


@pytest.mark.parametrize("value", [4, 200])
def test_a_label_without_a_name(tmp_path: Path, labels: np.ndarray, value: int) -> None:
    labels[0, 0, 0] = value
    with pytest.raises(DataError, match=f"case 'full': .* {value}"):
        count(tmp_path, labels, dataset_json(4))
