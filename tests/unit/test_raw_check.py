"""masksam check, and what masksam plan checks first: every defect of a raw dataset is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from kinds_of_data import Kind
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app

KIND = Kind(44, "Raw", [(4, 12, 10)] * 6, {"background": 0, "first": 1, "second": 2}, (1, 2), spacing=(1.0, 1.0, 3.0))
NAME = KIND.dataset


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    (root / "nnUNet_preprocessed").mkdir()
    KIND.write(root / "nnUNet_raw")
    KIND.write_fingerprint(root / "nnUNet_preprocessed")
    return root


@pytest.fixture
def raw(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw dataset of its own for each test."""
    root = tmp_path / "nnU-Net"
    shutil.copytree(sound, root)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(root / name))
    return root / "nnUNet_raw" / NAME


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(command: str = "check") -> str:
    """What a command says that must fail in words, and leave nothing."""
    result = run(command, "-d", "44", *(("--backbone", "tiny") if command == "plan" else ()))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def image(raw: Path, case: str = "case_03") -> Path:
    return raw / "imagesTr" / f"{case}_0000.nii.gz"


def label(raw: Path, case: str = "case_03") -> Path:
    return raw / "labelsTr" / f"{case}.nii.gz"


def describe(raw: Path, **changes: Any) -> None:
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not REMOVED}))


REMOVED = object()


def edit(path: Path, change: Callable[[sitk.Image], sitk.Image | None]) -> None:
    picture = sitk.ReadImage(str(path))
    sitk.WriteImage(change(picture) or picture, str(path))


def with_value(path: Path, value: float) -> None:
    """Another number in one voxel, stored as floating point."""
    picture = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
    picture[4, 4, 2] = value
    sitk.WriteImage(picture, str(path))


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)


# --- sound --------------------------------------------------------------------------------------------------


def test_a_sound_dataset(raw: Path) -> None:
    result = run("check", "-d", "44")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{NAME}: 6 cases, no defects\n", "")


@pytest.mark.parametrize(
    "kind",
    [
        Kind(45, "Colours", [(1, 24, 20)] * 5, {"background": 0, "a": 1}, (1,), channels=3, ending=".png"),
        Kind(46, "Channels", [(4, 9, 8)] * 5, {"background": 0, "a": 1}, (1,), channels=4),
        Kind(
            47, "Regions", [(4, 9, 8)] * 5, {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, (1, 2),
            ignored=3, more={"regions_class_order": [1, 2]},
        ),
    ],
    ids=lambda kind: kind.name,
)  # fmt: skip
def test_other_kinds_are_sound(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.write(tmp_path)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    result = run("check", "-d", str(kind.id))
    assert (result.exit_code, result.stderr) == (0, "")


def test_notes_are_no_defects(raw: Path) -> None:
    edit(label(raw, "case_00"), lambda picture: picture * 0)
    edit(image(raw, "case_01"), lambda picture: picture * 0)
    swap(image(raw, "case_05"), image(raw, "case_04"))
    result = run("check", "-d", "44")
    assert result.exit_code == 0
    for note in ("case_00.nii.gz holds background only", "case_01_0000.nii.gz holds one value", "case_04, case_05"):
        assert note in result.stderr


# --- files --------------------------------------------------------------------------------------------------


def test_every_defect_is_listed(raw: Path) -> None:
    """nnU-Net's own check would stop at the first, and see neither the second nor the third."""
    edit(label(raw, "case_00"), lambda picture: picture[:-1, :, :])
    with_value(image(raw, "case_01"), np.nan)
    cut(image(raw, "case_02"))
    label(raw, "case_04").unlink()
    message = refused()
    defects = [line for line in message.splitlines() if line.startswith("defect: ")]
    for defect, found in zip(
        sorted(defects),
        [("case_00.nii.gz", "shape"), ("case_01_0000", "NaN"), ("case_02_0000", "cut off"), ("case_04", "missing")],
        strict=True,
    ):
        assert all(word in defect for word in found), defect


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated image": (lambda raw: cut(image(raw)), "case_03_0000.nii.gz is cut off or damaged"),
    "truncated label": (lambda raw: cut(label(raw)), "case_03.nii.gz is cut off or damaged"),
    "empty file": (lambda raw: image(raw).write_bytes(b""), "no NIfTI header"),
    "web page": (lambda raw: label(raw).write_text("<html>"), "begins with b'<html>'"),
    "infinite voxel": (lambda raw: with_value(image(raw), np.inf), "holds 1 voxels that are NaN or infinite"),
    "NaN label": (lambda raw: with_value(label(raw), np.nan), "such as nan"),
    "probability": (lambda raw: with_value(label(raw), 0.5), "such as 0.5"),
    "unknown label": (lambda raw: with_value(label(raw), 7), "holds the labels 7,"),
    "negative label": (lambda raw: with_value(label(raw), -1), "holds the labels -1,"),
    "spacing": (lambda raw: edit(label(raw), lambda p: p.SetSpacing((1, 1, 2))), "differ in spacing ((3.0, 1.0, 1.0)"),
    "origin": (lambda raw: edit(label(raw), lambda p: p.SetOrigin((0, 0, 0))), "differ in origin"),
    "direction": (lambda raw: edit(label(raw), lambda p: p.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))), "in direction"),
    "no label": (lambda raw: label(raw).unlink(), "case_03.nii.gz is missing"),
    "no image": (lambda raw: image(raw).unlink(), "labelsTr/case_03.nii.gz has no image"),
    "name without channel": (
        lambda raw: image(raw).rename(raw / "imagesTr" / "case_03.nii.gz"),
        "imagesTr/case_03.nii.gz is not named",
    ),
    "macOS's double": (
        lambda raw: (raw / "imagesTr" / "._case_03_0000.nii.gz").write_bytes(b"x"),
        "imagesTr/._case_03_0000.nii.gz is not named",
    ),
    "channel left out": (
        lambda raw: image(raw).rename(raw / "imagesTr" / "case_03_0001.nii.gz"),
        "case 'case_03' has the channels 0001",
    ),
    "a channel more": (
        lambda raw: swap(raw / "imagesTr" / "case_03_0001.nii.gz", image(raw)),
        "case 'case_03' has 2 image files",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", FILES)
def test_defects_of_files(raw: Path, defect: str) -> None:
    spoil, said = FILES[defect]
    spoil(raw)
    assert said in refused()


PLANNED = ("truncated label", "web page", "NaN label", "unknown label", "no label", "name without channel")


@pytest.mark.parametrize("defect", PLANNED)
def test_planning_stops_at_defects_of_labels(raw: Path, defect: str) -> None:
    spoil, _ = FILES[defect]
    spoil(raw)
    before = sorted(raw.parents[1].rglob("*"))
    assert "case_03" in refused("plan")
    assert sorted(raw.parents[1].rglob("*")) == before


def test_planning_reads_the_first_case_whole(raw: Path) -> None:
    describe(raw, channel_names={"0": "T1", "1": "T2"})
    message = refused("plan")
    assert "case 'case_00' has 1 channels" in message and "masksam check -d 44" in message


def test_channels_on_different_grids(raw: Path) -> None:
    describe(raw, channel_names={"0": "T1", "1": "T2"})
    for case in KIND.cases:
        swap(raw / "imagesTr" / f"{case}_0001.nii.gz", image(raw, case))
    edit(raw / "imagesTr" / "case_02_0001.nii.gz", lambda picture: picture[1:, :, :])
    assert "case_02_0000.nii.gz and case_02_0001.nii.gz differ in shape" in refused()


def test_an_empty_dataset(raw: Path) -> None:
    for path in (*(raw / "imagesTr").iterdir(), *(raw / "labelsTr").iterdir()):
        path.unlink()
    assert "0 training cases" in refused()
    shutil.rmtree(raw / "imagesTr")
    assert "imagesTr" in refused()


# --- dataset.json -------------------------------------------------------------------------------------------


DESCRIPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda raw: (raw / "dataset.json").write_text('{"labels":'), "dataset.json cannot be read"),
    "another encoding": (
        lambda raw: (raw / "dataset.json").write_bytes("ä".encode("latin-1")),
        "dataset.json cannot be read",
    ),
    "no object": (lambda raw: (raw / "dataset.json").write_text("[]"), "found []"),
    "keys missing": (
        lambda raw: describe(raw, numTraining=REMOVED, labels=REMOVED),
        "labels, numTraining is missing",
    ),
    "numTraining": (lambda raw: describe(raw, numTraining=7), "numTraining = 7"),
    "numTraining NaN": (
        lambda raw: describe(raw, numTraining=np.nan),
        "numTraining must be",
    ),
    "gap": (lambda raw: describe(raw, labels={"background": 0, "a": 1, "b": 3}), "found 0, 1, 3"),
    "two names": (lambda raw: describe(raw, labels={"background": 0, "a": 1, "b": 1}), "1 has several"),
    "no background": (lambda raw: describe(raw, labels={"a": 1, "b": 2}), 'labels must have "background": 0'),
    "background only": (lambda raw: describe(raw, labels={"background": 0}), "at least one foreground"),
    "MSD's order": (lambda raw: describe(raw, labels={"0": "background", "1": "a"}), "labels must be"),
    "labels as a list": (lambda raw: describe(raw, labels=[0, 1]), "labels must be"),
    "ignore in between": (
        lambda raw: describe(raw, labels={"background": 0, "ignore": 1, "a": 1, "b": 2}),
        "ignore must be the highest label, 3, found 1",
    ),
    "regions without order": (
        lambda raw: describe(raw, labels={"background": 0, "a": [1, 2], "b": 2}),
        "regions_class_order must be a list of 2",
    ),
    "channels as a list": (lambda raw: describe(raw, channel_names=["CT"]), "channel_names must be"),
    "no channels": (lambda raw: describe(raw, channel_names={}), "channel_names must be"),
    "unknown ending": (lambda raw: describe(raw, file_ending=".dcm"), "file_ending must be one of"),
    "odd list of files": (lambda raw: describe(raw, dataset={"a": {"images": 3}}), "dataset must be {CASE:"),
    "is a folder": (
        lambda raw: (raw / "dataset.json").rename(raw / "x") and (raw / "dataset.json").mkdir(),
        "dataset.json is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DESCRIPTIONS)
def test_defects_of_dataset_json(raw: Path, defect: str) -> None:
    spoil, said = DESCRIPTIONS[defect]
    spoil(raw)
    assert said in refused()


def test_all_defects_of_dataset_json_are_listed_and_planning_stops(raw: Path) -> None:
    describe(raw, channel_names=["CT"], numTraining=-1, file_ending=".dcm", labels={"background": 0, "a": 2})
    for command in ("check", "plan"):
        message = refused(command)
        assert all(key in message for key in ("channel_names", "numTraining", "file_ending", "labels"))
    assert not (raw.parents[1] / "nnUNet_preprocessed" / NAME / "MaskSAMPlans.json").exists()


# --- what planning reads besides ----------------------------------------------------------------------------


def preprocessed(raw: Path, name: str) -> Path:
    return raw.parents[1] / "nnUNet_preprocessed" / NAME / name


BESIDES: dict[str, tuple[str, str, str]] = {
    "fingerprint no JSON": ("dataset_fingerprint.json", "{", "dataset_fingerprint.json is damaged"),
    "fingerprint without sizes": ("dataset_fingerprint.json", '{"a": 1}', "KeyError: 'spacings'"),
    "fingerprint of NaN": (
        "dataset_fingerprint.json",
        json.dumps({"spacings": [[np.nan] * 3] * 6, "shapes_after_crop": [[4, 12, 10]] * 6}),
        "dataset_fingerprint.json holds sizes",
    ),
    "fingerprint of fewer cases": (
        "dataset_fingerprint.json",
        json.dumps({"spacings": [[1, 1, 1]], "shapes_after_crop": [[4, 12, 10]]}),
        "is of 1 cases, the dataset has 6",
    ),
    "plans no JSON": ("nnUNetPlans.json", "{", "nnUNetPlans.json is not JSON"),
    "plans of nothing": ("nnUNetPlans.json", "[]", "nnUNetPlans.json holds no plans"),
    "plans of another dataset": (
        "nnUNetPlans.json",
        '{"dataset_name": "Dataset001_Other", "configurations": {"2d": {}}}',
        "holds plans of 'Dataset001_Other'",
    ),
    "plans of another version": (
        "nnUNetPlans.json",
        json.dumps({"dataset_name": NAME, "configurations": {"2d": {"UNet_class_name": "PlainConvUNet"}}}),
        "nnUNetPlans.json is damaged",
    ),
    "own plans damaged": (
        "MaskSAMPlans.json",
        json.dumps({"dataset_name": NAME, "masksam": 3, "configurations": {"a": {"inherits_from": "a"}}}),
        "MaskSAMPlans",
    ),
    "splits no JSON": ("splits_final.json", "{", "splits_final.json cannot be read"),
    "splits no folds": ("splits_final.json", '[{"train": ["case_00"]}]', "is not a list of folds"),
    "splits of other cases": (
        "splits_final.json",
        '[{"train": ["case_00"], "val": ["nobody"]}]',
        "nobody",
    ),
    "splits without training": ("splits_final.json", '[{"train": [], "val": ["case_00"]}]', "trains on no case"),
}


@pytest.mark.parametrize("defect", BESIDES)
def test_what_planning_reads_besides(raw: Path, defect: str) -> None:
    name, content, said = BESIDES[defect]
    preprocessed(raw, name).write_text(content)
    assert said in refused("plan")
    assert not preprocessed(raw, "MaskSAMPlans.json").exists() or name == "MaskSAMPlans.json"
    if name == "splits_final.json":
        assert said in refused("check")


def test_overlapping_folds(raw: Path) -> None:
    """Planning warns, since it may be meant so; check lists them."""
    folds = [{"train": ["case_00", "case_01"], "val": ["case_01"]}, {"train": ["case_02"], "val": ["case_01"]}]
    preprocessed(raw, "splits_final.json").write_text(json.dumps(folds))
    message = refused()
    assert "fold 0 validates cases that it trains on: case_01" in message
    assert "several folds validate the same cases: case_01" in message
    planned = run("plan", "-d", "44", "--backbone", "tiny", "-c", "3d_fullres")
    assert planned.exit_code == 0
    assert "warning: splits_final.json: fold 0 validates cases that it trains on: case_01" in planned.stdout


def test_a_number_that_two_datasets_have(raw: Path) -> None:
    (raw.parent / "Dataset044_Other").mkdir()
    for command in ("check", "plan"):
        assert all(name in refused(command) for name in ("Dataset044_Other", "Dataset044_Raw"))


def test_variables_that_are_not_set(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in refused()
