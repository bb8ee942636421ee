"""Phantoms: a valid raw dataset, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from masksam_nnunet.inference.phantoms import DATASET_NAME, LABELS, Phantom, make_phantom, write_phantom_dataset
from masksam_nnunet.plans.raw_data import read_raw_dataset

FOREGROUND = [value for value in LABELS.values() if value]


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(np.random.default_rng([0, index])) for index in range(5)]


def test_every_organ_is_there_and_differs_between_cases(phantoms: list[Phantom]) -> None:
    volumes = np.array([[np.count_nonzero(p.label == value) for value in FOREGROUND] for p in phantoms])
    assert volumes.min() > 80
    assert (volumes.std(axis=0) / volumes.mean(axis=0) > 0.1).all()
    assert len({p.image.shape for p in phantoms}) > 1 and len({p.spacing for p in phantoms}) > 1


def test_dataset_is_nnunet_raw(tmp_path: Path) -> None:
    folder = write_phantom_dataset(tmp_path, num_cases=5, seed=3, num_test_cases=1)
    assert folder.name == DATASET_NAME
    dataset = read_raw_dataset(folder)
    assert len(dataset.images) == 5
    assert [p.name for p in sorted((folder / "imagesTs").iterdir())] == ["phantom_005_0000.nii.gz"]
    assert dataset.dataset_json["labels"] == LABELS and dataset.dataset_json["numTraining"] == 5
    phantom = make_phantom(np.random.default_rng([3, 0]))
    image = sitk.ReadImage(str(folder / "imagesTr" / "phantom_000_0000.nii.gz"))
    label = sitk.ReadImage(str(folder / "labelsTr" / "phantom_000.nii.gz"))
    assert np.allclose(image.GetSpacing(), phantom.spacing[::-1], atol=1e-5)
    assert np.allclose(image.GetOrigin(), phantom.origin[::-1], atol=1e-3)
    assert image.GetSize() == label.GetSize() == phantom.image.shape[::-1]
    assert np.allclose(label.GetOrigin(), image.GetOrigin())
    assert np.array_equal(sitk.GetArrayFromImage(label), phantom.label)


def test_a_case_depends_on_its_seed_and_number(tmp_path: Path) -> None:
    first, second, other = (
        write_phantom_dataset(tmp_path / name, num_cases=cases, seed=seed, num_test_cases=0)
        for name, cases, seed in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1))
    )
    name = Path("imagesTr") / "phantom_000_0000.nii.gz"
    assert (first / name).read_bytes() == (second / name).read_bytes() != (other / name).read_bytes()
