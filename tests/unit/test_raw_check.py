"""masksam check, and what masksam plan checks first: every defect of a raw dataset is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from kinds_of_data import Kind
from plain_plans import simple_cost
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.plans import sizing

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
    monkeypatch.setattr(sizing, "training_cost", simple_cost)
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


def shear(path: Path) -> None:
    """A gantry's tilt: an affine that is no rotation, which ITK refuses and nibabel reads."""
    volume = nibabel.load(path)
    tilted = nibabel.Nifti1Image(np.asarray(volume.dataobj), None)
    affine = np.eye(4)
    affine[1, 2] = 0.3
    tilted.header.set_zooms((1, 1, 1))
    tilted.set_sform(affine, 1)
    tilted.set_qform(None, 0)
    nibabel.save(tilted, path)


def stack(path: Path) -> None:
    """The same voxels twice, along a fourth axis."""
    volume = nibabel.load(path)
    voxels = np.stack([np.asarray(volume.dataobj)] * 2, -1)
    nibabel.save(nibabel.Nifti1Image(voxels, volume.affine), path)


def place_twice(path: Path, millimetres: float) -> None:
    volume = nibabel.load(path)
    moved = volume.affine.copy()
    moved[0, 3] += millimetres
    volume.set_qform(moved, 1)
    nibabel.save(nibabel.Nifti1Image(np.asarray(volume.dataobj), None, volume.header), path)


# --- sound --------------------------------------------------------------------------------------------------


def test_a_sound_dataset(raw: Path) -> None:
    result = run("check", "-d", "44")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{NAME}: 6 cases, no defects\n", "")


def test_files_of_one_name_in_folders_of_one_name_are_told_apart(raw: Path) -> None:
    paths = [raw / sequence / "p01" / "image.nii.gz" for sequence in ("t1", "t2")]
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copy(image(raw), path)
    edit(paths[1], lambda picture: picture[:, :, :3])
    mask = raw / "labelsTr" / "case_03.nii.gz"
    entries = {"p01": {"images": [str(path) for path in paths], "label": str(mask)}}
    describe(raw, dataset=entries, numTraining=1, channel_names={"0": "T1", "1": "T2"})
    assert f"{paths[0]} and {paths[1]} differ" in refused()


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
    for note in ("case_00.nii.gz", "case_01_0000.nii.gz", "case_04, case_05"):
        assert note in result.stderr


def noted() -> list[str]:
    result = run("check", "-d", "44")
    assert result.exit_code == 0, result.stderr
    return result.stderr.splitlines()


def test_voxels_of_another_unit_are_noted(raw: Path) -> None:
    for path in (image(raw), label(raw)):
        edit(path, lambda picture: picture.SetSpacing((1e-3, 1e-3, 3e-3)))
    (note,) = noted()
    assert "case_03" in note and "0.003x0.001x0.001" in note and "3x1x1" in note


def test_voxels_that_are_needles_are_noted(raw: Path) -> None:
    for case in KIND.cases:
        for path in (image(raw, case), label(raw, case)):
            edit(path, lambda picture: picture.SetSpacing((1e-3, 1.0, 3.0)))
    assert len(notes := noted()) == 6 and all("3x1x0.001" in note for note in notes)


def test_a_header_that_places_an_image_twice_is_noted(raw: Path) -> None:
    place_twice(image(raw), 30)
    place_twice(image(raw, "case_04"), 0.01)  # rounding
    with_note = noted()
    assert len(with_note) == 1 and "case_03_0000.nii.gz" in with_note[0] and "30 mm" in with_note[0]


def test_labels_that_no_case_has_are_noted(raw: Path) -> None:
    describe(raw, labels={"background": 0, "first": 1, "second": 2, "third": 3})
    (note,) = noted()
    assert "labels 3" in note


@pytest.mark.parametrize(
    ("labels", "order", "lost"),
    [
        ({"background": 0, "core": [2], "whole": [1, 2]}, [2, 1], "2 becomes 1"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, [1, 7], "2 becomes 7"),
        ({"background": 0, "whole": [1, 2]}, [1], "2 becomes 1"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2], None),
    ],
)
def test_regions_that_lose_labels_are_noted(
    raw: Path, labels: dict[str, Any], order: list[int], lost: str | None
) -> None:
    describe(raw, labels=labels, regions_class_order=order)
    notes = noted()
    assert [note for note in notes if "regions_class_order" in note] == notes
    assert len(notes) == (lost is not None) and (lost is None or lost in notes[0])


def test_statistics_of_ct_without_the_ignore_label(raw: Path) -> None:
    """nnU-Net would count air, here -1000 under the ignore label, as foreground."""
    describe(raw, channel_names={"0": "ct"}, labels={"background": 0, "first": 1, "second": 2, "ignore": 3})
    for case in KIND.cases:
        seg = sitk.GetArrayFromImage(sitk.ReadImage(str(label(raw, case))))
        seg[:, :3] = 3
        seg[0, 5, 5] = 1
        for path, array in ((label(raw, case), seg), (image(raw, case), np.where(seg == 3, -1000.0, 40.0))):
            picture = sitk.GetImageFromArray(array.astype(np.float32))
            picture.CopyInformation(sitk.ReadImage(str(path)))
            sitk.WriteImage(picture, str(path))
    notes = [note for note in noted() if "dataset_fingerprint.json" in note]
    assert len(notes) == 1
    (found,) = json.loads(notes[0][notes[0].index(": {") + 2 :]).values()
    assert found["min"] == found["percentile_00_5"] == found["mean"] == found["max"] == 40 and found["std"] == 0


def test_a_number_that_nnunet_finds_twice_is_noted(raw: Path) -> None:
    """nnU-Net looks for names that begin with Dataset044, which Dataset0441_Other does too."""
    (raw.parent / "Dataset0441_Other").mkdir()
    (note,) = noted()
    assert "Dataset0441_Other" in note


@pytest.mark.parametrize("name", ["Dataset1001_Big", "Dataset044_Prostate MRI"])
def test_names_that_nnunet_takes(raw: Path, name: str) -> None:
    folders = [raw, raw.parents[1] / "nnUNet_preprocessed" / NAME]
    for folder in folders:
        folder.rename(folder.with_name(name))
    number = name[len("Dataset") :].split("_")[0]
    assert run("check", "-d", number).exit_code == 0
    planned = run("plan", "-d", number, "--backbone", "tiny", "-c", "3d_fullres")
    assert planned.exit_code == 0, planned.stderr
    assert f"-d {int(number)}" in planned.stdout or f"nnUNetv2_train {int(number)}" in planned.stdout


# --- files --------------------------------------------------------------------------------------------------


def test_every_defect_is_listed(raw: Path) -> None:
    """nnU-Net's own check would stop at the first, and see neither the second nor the third."""
    edit(label(raw, "case_00"), lambda picture: picture[:-1, :, :])
    with_value(image(raw, "case_01"), np.inf)
    cut(image(raw, "case_02"))
    label(raw, "case_04").unlink()
    message = refused()
    defects = [line for line in message.splitlines() if line.startswith("defect: ")]
    for defect, found in zip(
        sorted(defects),
        ["case_00.nii.gz", "case_01_0000", "case_02_0000", "case_04"],
        strict=True,
    ):
        assert found in defect


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated label": (lambda raw: cut(label(raw)), "labelsTr/case_03.nii.gz"),
    "web page": (lambda raw: label(raw).write_text("<html>"), "<html>"),
    "NaN label": (lambda raw: with_value(label(raw), np.nan), "nan"),
    "probability": (lambda raw: with_value(label(raw), 0.5), "0.5"),
    "unknown label": (lambda raw: with_value(label(raw), 7), "labels 7"),
    "spacing": (lambda raw: edit(label(raw), lambda p: p.SetSpacing((1, 1, 2))), "spacing"),
    "origin": (lambda raw: edit(label(raw), lambda p: p.SetOrigin((0, 0, 0))), "origin"),
    "direction": (lambda raw: edit(label(raw), lambda p: p.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))), "direction"),
    "no rotation": (lambda raw: (shear(image(raw)), shear(label(raw))), "orthonormal"),
    "no data": (lambda raw: with_value(image(raw), -3.4e38), "case_03_0000.nii.gz holds 1 voxels"),
    "channels in one file": (lambda raw: stack(image(raw)), "4D"),
    "one-hot label": (lambda raw: stack(label(raw)), "2 channels"),
    "no image": (lambda raw: image(raw).unlink(), "labelsTr/case_03.nii.gz"),
    "name without channel": (lambda raw: image(raw).rename(raw / "imagesTr" / "case_03.nii.gz"), "case_03.nii.gz"),
    "channel left out": (lambda raw: image(raw).rename(raw / "imagesTr" / "case_03_0001.nii.gz"), "0001"),
    "a channel more": (lambda raw: swap(raw / "imagesTr" / "case_03_0001.nii.gz", image(raw)), "case_03"),
}


@pytest.mark.parametrize("defect", FILES)
def test_defects_of_files(raw: Path, defect: str) -> None:
    spoil, said = FILES[defect]
    spoil(raw)
    assert said in refused()


def test_labels_in_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind(44, "Colours", [(1, 24, 20)] * 5, {"background": 0, "a": 1}, (1,), channels=3, ending=".png")
    folder = kind.write(tmp_path)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    grey = sitk.GetArrayFromImage(sitk.ReadImage(str(file := folder / "labelsTr" / "case_02.png")))
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([grey] * 3, -1), isVector=True), str(file))
    assert "case_02.png" in (message := refused()) and "3 channels" in message


def test_only_background(raw: Path) -> None:
    for case in KIND.cases:
        edit(label(raw, case), lambda picture: picture * 0)
    assert "foreground" in refused()
    preprocessed(raw, "dataset_fingerprint.json").write_text(
        json.dumps(
            {
                "spacings": [[3, 1, 1]] * 6,
                "shapes_after_crop": [[4, 12, 10]] * 6,
                "foreground_intensity_properties_per_channel": {"0": {"mean": np.nan}},
            }
        )
    )
    assert "dataset_fingerprint.json" in refused("plan")


def test_single_slices_along_the_wrong_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net would plan slices of one column; with the largest voxels across the slice it turns the axes itself."""
    kind = Kind(44, "Slices", [(30, 40, 1)] * 5, {"background": 0, "a": 1}, (1,))
    folder = kind.write(tmp_path)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert "30x40x1" in refused()
    for path in (*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()):
        edit(path, lambda picture: picture.SetSpacing((9.0, 1.0, 1.0)))
    assert run("check", "-d", "44").exit_code == 0


def test_planning_stops_at_a_defect_of_names(raw: Path) -> None:
    spoil, _ = FILES["name without channel"]
    spoil(raw)
    assert "case_03" in refused("plan")
    assert not preprocessed(raw, "MaskSAMPlans.json").exists()


def test_channels_on_different_grids(raw: Path) -> None:
    describe(raw, channel_names={"0": "T1", "1": "T2"})
    for case in KIND.cases:
        swap(raw / "imagesTr" / f"{case}_0001.nii.gz", image(raw, case))
    edit(raw / "imagesTr" / "case_02_0001.nii.gz", lambda picture: picture[1:, :, :])
    message = refused()
    assert "case_02_0000.nii.gz" in message and "case_02_0001.nii.gz" in message and "shape" in message


def test_an_empty_dataset(raw: Path) -> None:
    for path in (*(raw / "imagesTr").iterdir(), *(raw / "labelsTr").iterdir()):
        path.unlink()
    assert NAME in refused()
    shutil.rmtree(raw / "imagesTr")
    assert "imagesTr" in refused()


# --- dataset.json -------------------------------------------------------------------------------------------


LABELS: dict[str, Any] = {
    "gap": {"background": 0, "a": 1, "b": 3},
    "two names": {"background": 0, "a": 1, "b": 1},
    "no background": {"a": 1, "b": 2},
    "background only": {"background": 0},
    "the decathlon's order": {"0": "background", "1": "a"},
    "list": [0, 1],
    "ignore in between": {"background": 0, "ignore": 1, "a": 1, "b": 2},
}
DESCRIPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda raw: (raw / "dataset.json").write_text('{"labels":'), "dataset.json"),
    "another encoding": (lambda raw: (raw / "dataset.json").write_bytes("ä".encode("latin-1")), "dataset.json"),
    "no object": (lambda raw: (raw / "dataset.json").write_text("[]"), "[]"),
    "key missing": (lambda raw: describe(raw, numTraining=REMOVED), "numTraining"),
    "numTraining": (lambda raw: describe(raw, numTraining=7), "numTraining = 7"),
    "regions without order": (
        lambda raw: describe(raw, labels={"background": 0, "a": [1, 2], "b": 2}),
        "regions_class_order",
    ),
    "channels as a list": (lambda raw: describe(raw, channel_names=["CT"]), "channel_names"),
    "no channels": (lambda raw: describe(raw, channel_names={}), "channel_names"),
    "odd list of files": (lambda raw: describe(raw, dataset={"a": {"images": 3}}), "dataset"),
    **{name: (lambda raw, labels=labels: describe(raw, labels=labels), "labels") for name, labels in LABELS.items()},
}


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


BESIDES = [
    ("dataset_fingerprint.json", "{"),
    ("dataset_fingerprint.json", '{"a": 1}'),
    ("dataset_fingerprint.json", json.dumps({"spacings": [[1, 1, 1]], "shapes_after_crop": [[4, 12, 10]]})),
    (
        "dataset_fingerprint.json",
        json.dumps({"spacings": [[np.nan] * 3] * 6, "shapes_after_crop": [[4, 12, 10]] * 6}),
    ),
    ("nnUNetPlans.json", "{"),
    ("nnUNetPlans.json", "[]"),
    ("nnUNetPlans.json", '{"dataset_name": "Dataset001_Other", "configurations": {"2d": {}}}'),
    ("nnUNetPlans.json", json.dumps({"dataset_name": NAME, "configurations": {"2d": {"UNet_class_name": "Plain"}}})),
    ("MaskSAMPlans.json", json.dumps({"dataset_name": NAME, "masksam": 3, "configurations": {"a": {}}})),
    ("splits_final.json", "{"),
    ("splits_final.json", '[{"train": ["case_00"]}]'),
    ("splits_final.json", '[{"train": ["case_00"], "val": ["nobody"]}]'),
    ("splits_final.json", '[{"train": [], "val": ["case_00"]}]'),
]


@pytest.mark.parametrize(("name", "content"), BESIDES)
def test_what_planning_reads_besides(raw: Path, name: str, content: str) -> None:
    preprocessed(raw, name).write_text(content)
    assert name in refused("plan")
    assert not preprocessed(raw, "MaskSAMPlans.json").exists() or name == "MaskSAMPlans.json"
    if name == "splits_final.json":
        assert name in refused("check")


def test_overlapping_folds(raw: Path) -> None:
    """Planning warns, since it may be meant so; check lists them."""
    folds = [{"train": ["case_00", "case_01"], "val": ["case_01"]}, {"train": ["case_02"], "val": ["case_01"]}]
    preprocessed(raw, "splits_final.json").write_text(json.dumps(folds))
    message = refused()
    assert len([line for line in message.splitlines() if line.startswith("defect: ") and "case_01" in line]) == 2
    planned = run("plan", "-d", "44", "--backbone", "tiny", "-c", "3d_fullres")
    assert planned.exit_code == 0
    assert "warning: splits_final.json: fold 0" in planned.stdout


def test_datasets_that_are_not_found(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw.parent / "Dataset044_Other").mkdir()
    for command in ("check", "plan"):
        assert all(name in refused(command) for name in ("Dataset044_Other", "Dataset044_Raw"))
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw" in refused()
