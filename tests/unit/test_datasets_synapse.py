"""Synapse: TransUNet's split, organs by name, both names of the test folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from challenge_replicas import (
    SYNAPSE_LABELLED,
    build_synapse,
    nnunet_folders,
    nnunet_reads,
    same_volume,
    volume,
    write_image,
)

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.datasets import convert
from masksam_nnunet.plans.datasets.synapse import ORGANS_8, ORGANS_13, TEST_12, TRAIN_18


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return nnunet_folders(tmp_path, monkeypatch)


def numbers(folder: Path, ending: str) -> list[int]:
    return sorted(int(path.name.removeprefix("img").removesuffix(ending)) for path in folder.iterdir())


def test_18_cases_for_training_12_for_testing(raw: Path, tmp_path: Path) -> None:
    source = build_synapse(tmp_path)
    folder = convert("synapse", source, 7)
    assert folder == raw / "Dataset007_Synapse13"
    for part, expected in (("Tr", TRAIN_18), ("Ts", TEST_12)):
        assert numbers(folder / f"images{part}", "_0000.nii.gz") == list(expected)
        assert numbers(folder / f"labels{part}", ".nii.gz") == list(expected)
    for case, part in ((5, "Tr"), (38, "Ts")):
        training = source / "Training"
        assert same_volume(
            folder / f"images{part}" / f"img{case:04d}_0000.nii.gz", training / "img" / f"img{case:04d}.nii.gz"
        )
        assert same_volume(
            folder / f"labels{part}" / f"img{case:04d}.nii.gz", training / "label" / f"label{case:04d}.nii.gz"
        )
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"}
    assert description["labels"] == {"background": 0} | {organ: value for value, organ in enumerate(ORGANS_13, 1)}
    assert description["numTraining"] == 18 and description["file_ending"] == ".nii.gz"
    assert "syn3193805" in description["reference"] and "TransUNet" in description["description"]


def test_without_a_split_all_30_train_and_the_unlabelled_are_tests(raw: Path, tmp_path: Path) -> None:
    source = build_synapse(tmp_path, test_folder="Testing")
    folder = convert("synapse", source.parent, 7, split="none")
    assert numbers(folder / "imagesTr", "_0000.nii.gz") == list(SYNAPSE_LABELLED)
    assert numbers(folder / "labelsTr", ".nii.gz") == list(SYNAPSE_LABELLED)
    assert numbers(folder / "imagesTs", "_0000.nii.gz") == list(range(61, 81))
    assert not (folder / "labelsTs").exists()
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 30


def test_8_organs_are_found_by_name(raw: Path, tmp_path: Path) -> None:
    source = build_synapse(tmp_path, unlabelled=())
    folder = convert("synapse", source, 8, organs=8)
    assert folder.name == "Dataset008_Synapse8"
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "aorta": 1, "gallbladder": 2, "left kidney": 3, "right kidney": 4, "liver": 5,
                      "pancreas": 6, "spleen": 7, "stomach": 8}  # fmt: skip
    for case, part in ((9, "Tr"), (10, "Tr"), (1, "Ts")):  # 9 and 1 are stored as floating-point numbers
        original, placed = volume(source / "Training" / "label" / f"label{case:04d}.nii.gz")
        ours, placed_here = volume(folder / f"labels{part}" / f"img{case:04d}.nii.gz")
        assert ours.dtype == np.uint8 and np.allclose(placed, placed_here)
        for organ in ORGANS_8:
            assert np.array_equal(ours == labels[organ], original == 1 + ORGANS_13.index(organ))
        for organ in set(ORGANS_13) - set(ORGANS_8):
            assert (ours[original == 1 + ORGANS_13.index(organ)] == 0).all()
    nnunet_reads(folder, "img0009")


def refused(raw: Path, source: Path, **options: object) -> str:
    with pytest.raises(DataError) as error:
        convert("synapse", source, 7, **options)
    assert not raw.exists() or not list(raw.iterdir())
    return str(error.value)


def test_incomplete_downloads(raw: Path, tmp_path: Path) -> None:
    source = build_synapse(tmp_path, unlabelled=(61, 62))
    label = source / "Training" / "label" / "label0007.nii.gz"
    content = label.read_bytes()
    label.write_bytes(content[:-9])
    assert "Training/label/label0007.nii.gz" in refused(raw, source)
    label.unlink()
    assert "label0007" in refused(raw, source, partial=True)  # an image without its label is never accepted
    label.write_bytes(content)
    assert "Test/img/img0063.nii.gz" in refused(raw, source, split="none")
    write_image(source / "Training" / "img" / "img0050.nii.gz", 50)
    assert "img0050.nii.gz" in refused(raw, source)


def test_few_cases(raw: Path, tmp_path: Path) -> None:
    source = build_synapse(tmp_path, labelled=(1, 5, 6), unlabelled=())
    message = refused(raw, source)
    assert "54" in message and "--partial" in message
    folder = convert("synapse", source, 7, partial=True)
    assert numbers(folder / "imagesTr", "_0000.nii.gz") == [5, 6]
    assert numbers(folder / "labelsTs", ".nii.gz") == [1]
    only_test = build_synapse(tmp_path / "test", labelled=(1, 2), unlabelled=())
    with pytest.raises(DataError, match="no training case"):
        convert("synapse", only_test, 8, partial=True)


def test_other_bad_input(raw: Path, tmp_path: Path) -> None:
    assert "--organs 9" in refused(raw, tmp_path, organs=9)
    assert "--split 24/6" in refused(raw, tmp_path, split="24/6")
    assert "Training" in refused(raw, tmp_path)
