"""AMOS22: CT alone or CT and MR; every case that dataset.json lists, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from challenge_replicas import AMOS_LABELS, build_amos, files, nnunet_folders, same_volume, write_label

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.datasets import convert


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return nnunet_folders(tmp_path, monkeypatch)


def refused(raw: Path, source: Path, modality: str = "ct") -> str:
    with pytest.raises(DataError) as error:
        convert("amos", source, 218, modality=modality)
    assert not raw.exists() or not list(raw.iterdir())
    return str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("modality", "name", "training", "test", "channel"),
    [
        ("ct", "task1", (1, 4, 8, 409, 410), (2, 411, 500), "CT"),
        ("all", "task2", (1, 4, 8, 409, 410, 507, 540, 600), (2, 411, 500, 555), "either_CT_or_MR"),
    ],
)
def test_the_official_structure(
    raw: Path, tmp_path: Path, modality: str, name: str, training: tuple[int, ...], test: tuple[int, ...], channel: str
) -> None:
    source = build_amos(tmp_path / "amos")
    folder = convert("amos", source, 218, modality=modality)
    assert folder == raw / f"Dataset218_AMOS2022_postChallenge_{name}"
    assert names(folder / "imagesTr") == [f"amos_{number:04d}_0000.nii.gz" for number in training]
    assert names(folder / "labelsTr") == [f"amos_{number:04d}.nii.gz" for number in training]
    assert names(folder / "imagesTs") == [f"amos_{number:04d}_0000.nii.gz" for number in test]
    assert same_volume(folder / "labelsTr" / "amos_0008.nii.gz", source / "labelsVa" / "amos_0008.nii.gz")
    assert same_volume(folder / "imagesTr" / "amos_0410_0000.nii.gz", source / "imagesTr" / "amos_0410.nii.gz")

    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": channel}
    assert description["labels"] == {name: value for value, name in enumerate(AMOS_LABELS)}
    assert description["numTraining"] == len(training)
    assert description["licence"] == "CC BY 4.0" and "zenodo" in description["release"]
    assert description["overwrite_image_reader_writer"] == "NibabelIOWithReorient"


def test_ct_needs_no_mr_files(raw: Path, tmp_path: Path) -> None:
    """Numbers up to 500 are CT; nnunetv2's own converter stops at 410."""
    source = build_amos(tmp_path / "amos", (1, 450, 507), (410,))
    for path in source.rglob("amos_05*.nii.gz"):
        if path.name != "amos_0500.nii.gz":
            path.unlink()
    assert "amos_0507.nii.gz" in refused(raw, source, "all")
    folder = convert("amos", source.parent, 218)  # the folder above also does
    assert names(folder / "labelsTr") == ["amos_0001.nii.gz", "amos_0410.nii.gz", "amos_0450.nii.gz"]


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return edit


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("labelsVa/amos_0409.nii.gz", Path.unlink, "labelsVa/amos_0409.nii.gz"),
        ("imagesTs/amos_0002.nii.gz", lambda p: p.write_bytes(p.read_bytes()[:99]), "imagesTs/amos_0002.nii.gz"),
        ("labelsTr/amos_0004.nii.gz", lambda p: write_label(p, 4, 18), "16, 17, 18"),
        ("dataset.json", lambda p: p.write_text("{"), "dataset.json"),
        ("dataset.json", lambda p: p.write_text("[]"), "labels"),
        ("dataset.json", _edit(lambda d: d.pop("validation")), "validation"),
        ("dataset.json", _edit(lambda d: d["labels"].pop("0")), "labels"),
        ("dataset.json", _edit(lambda d: d["labels"].update({"3": "spleen"})), "labels"),
        ("dataset.json", _edit(lambda d: d["test"].append({})), "'test'"),
        ("dataset.json", _edit(lambda d: d["test"].append({"image": "./imagesTs/x.nii.gz"})), "'x' of 'test'"),
        ("dataset.json", _edit(lambda d: d.update(training=d["training"][2:], validation=[])), "no training case"),
    ],
)
def test_defects(raw: Path, tmp_path: Path, path: str, change: Callable[[Path], object], named: str) -> None:
    assert "--modality mr" in refused(raw, tmp_path, "mr")
    source = build_amos(tmp_path / "amos", (1, 4, 507), (409,), (2, 555))
    change(source / path)
    before = files(source)
    assert named in refused(raw, source)
    assert files(source) == before  # a download is never touched
