"""ACDC: converted whole, frames after Info.cfg, split by patient; and what any converter owes to its target folder."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from challenge_replicas import acdc_frames, build_acdc, files, nnunet_folders, same_volume, write_image, write_label
from nnunetv2.dataset_conversion import Dataset027_ACDC
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.datasets import convert

SOME = {"training": (1, 2, 3, 5, 90), "testing": (101, 150)}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = nnunet_folders(tmp_path, monkeypatch)
    folder.mkdir()
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A download with few patients."""
    return build_acdc(tmp_path / "acdc", **SOME)


def refused(raw: Path, source: Path, dataset_id: int = 27, partial: bool = True) -> str:
    """The error of a conversion that fails and leaves nothing in nnUNet_raw."""
    before = files(raw) if raw.is_dir() else {}
    with pytest.raises(DataError) as error:
        convert("acdc", source, dataset_id, partial=partial)
    assert (files(raw) if raw.is_dir() else {}) == before
    assert not list(raw.glob(".*"))
    return str(error.value)


def test_the_official_structure(raw: Path, tmp_path: Path) -> None:
    source = build_acdc(tmp_path / "acdc")
    folder = convert("acdc", source, 27)
    assert folder == raw / "Dataset027_ACDC"
    assert [path.name for path in raw.iterdir()] == ["Dataset027_ACDC"]
    counts = {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()}
    assert counts == {"imagesTr": 200, "labelsTr": 200, "imagesTs": 100, "labelsTs": 100}

    for number, part, suffix in ((90, "training", "Tr"), (117, "testing", "Ts")):
        case = f"patient{number:03d}_frame{acdc_frames(number)[0]:02d}"
        original = source / part / f"patient{number:03d}" / case
        assert same_volume(folder / f"images{suffix}" / f"{case}_0000.nii.gz", Path(f"{original}.nii.gz"))
        assert same_volume(folder / f"labels{suffix}" / f"{case}.nii.gz", Path(f"{original}_gt.nii.gz"))

    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "cineMRI"}
    assert description["labels"] == {"background": 0, "RV": 1, "MLV": 2, "LVC": 3}
    assert len(get_filenames_of_train_images_and_targets(str(folder))) == 200

    frames = json.loads((folder / "frames.json").read_text())
    assert len(frames) == 300
    assert (frames["patient090_frame04"], frames["patient090_frame11"]) == ("ED", "ES")
    assert frames["patient101_frame01"] == "ED"

    splits = json.loads((folder / "splits_final.json").read_text())
    assert splits == Dataset027_ACDC.create_ACDC_split(str(folder / "labelsTr"))
    for fold in splits:
        train, val = ({case.split("_")[0] for case in fold[part]} for part in ("train", "val"))
        assert len(train) == 80 and len(val) == 20 and not train & val


def test_older_downloads_have_no_test_labels(raw: Path, tmp_path: Path) -> None:
    source = build_acdc(tmp_path / "acdc", **SOME, labelled_test=False)
    folder = convert("acdc", source.parent, 27, partial=True)  # the folder above also does
    assert not (folder / "labelsTs").exists()
    assert len(list((folder / "imagesTs").iterdir())) == 4


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _cut_content(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))


PATIENT = "training/patient090"
FRAME = f"{PATIENT}/patient090_frame04"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (f"{FRAME}.nii.gz", Path.unlink),
        (f"{FRAME}_gt.nii.gz", Path.unlink),
        ("testing/patient150/patient150_frame01_gt.nii.gz", Path.unlink),
        (f"{PATIENT}/Info.cfg", Path.unlink),
        (f"{PATIENT}/Info.cfg", lambda p: p.write_text("ED: 4\nES: 4\n")),
        (f"{PATIENT}/Info.cfg", lambda p: p.write_text("ED: 1\nES: 11\n")),
        (f"{FRAME}.nii.gz", _cut),
        (f"{FRAME}.nii.gz", _cut_content),
        (f"{FRAME}.nii.gz", lambda p: p.write_bytes(b"<html>not found</html>")),
        (f"{FRAME}.nii.gz", lambda p: write_image(p, 1, channels=2)),
        (f"{FRAME}_gt.nii.gz", lambda p: write_label(p, 95, 3)),  # another shape
        (f"{FRAME}_gt.nii.gz", lambda p: write_label(p, 94, 5)),  # unknown labels
        ("training/other", Path.mkdir),
    ],
)
def test_defects_are_named_and_nothing_is_written(
    raw: Path, source: Path, path: str, change: Callable[[Path], object]
) -> None:
    change(source / path)
    message = refused(raw, source)
    assert Path(path).parts[1] in message and "https://humanheart-project" in message


def test_other_incomplete_downloads(raw: Path, source: Path, tmp_path: Path) -> None:
    message = refused(raw, source, partial=False)
    assert "143" in message and "patient004" in message and "--partial" in message
    assert str(tmp_path / "nothing") in refused(raw, tmp_path / "nothing")
    (source / "testing").rename(source / "elsewhere")
    assert "testing" in refused(raw, source)
    unlabelled = build_acdc(tmp_path / "unlabelled", **SOME)
    for label in unlabelled.glob("training/*/patient*_gt.nii.gz"):
        label.unlink()
    assert "_gt.nii.gz" in refused(raw, unlabelled)
    assert "4 training patients" in refused(raw, build_acdc(tmp_path / "few", (1, 2, 3, 4), (101,)))


# --- any converter and its target -------------------------------------------------------------------------------------


def test_a_number_that_is_taken_is_refused_before_anything_is_read(raw: Path, tmp_path: Path) -> None:
    for folder in (raw, tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results"):
        other = folder / "Dataset027_Other"
        other.mkdir(parents=True)
        message = refused(raw, tmp_path / "nothing")
        assert "-d 27" in message and str(other) in message
        other.rmdir()


def test_other_targets_that_cannot_be(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1000):
        assert f"-d {number}" in refused(raw, source, number)
    monkeypatch.setenv("nnUNet_raw", str(source / "training" / "MANDATORY_CITATION.md"))
    with pytest.raises(DataError, match="MANDATORY_CITATION"):
        convert("acdc", source, 28, partial=True)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(DataError, match="nnUNet_raw"):
        convert("acdc", source, 28, partial=True)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), DataError),
        (RuntimeError("ITK"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_half_way_leaves_nothing(
    raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type
) -> None:
    def fail(labels: str) -> list[dict[str, list[str]]]:
        assert os.listdir(labels)  # half of it is written by now
        raise error

    monkeypatch.setattr("masksam_nnunet.plans.datasets.acdc.create_ACDC_split", fail)
    with pytest.raises(raised):
        convert("acdc", source, 27, partial=True)
    assert files(raw) == {} and not list(raw.iterdir())
