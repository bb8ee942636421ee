"""What ``masksam predict`` reads and writes: every bad case with its reason, no half file, post-processing."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from made_up_models import image, write_image
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import plain_plans

from masksam_nnunet.errors import CaseError, UsageError
from masksam_nnunet.inference.cases import Case, find_cases, preprocess_case, read_case
from masksam_nnunet.inference.methods import parse_members
from masksam_nnunet.inference.predict.output import Predictions
from masksam_nnunet.inference.predict.postprocessing import find_postprocessing, read_postprocessing

GZ = ".nii.gz"
SIZE = (40, 36, 5)
T1, T2 = "a_0000.nii.gz", "a_0001.nii.gz"
MODEL = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": GZ}


# --- cases --------------------------------------------------------------------------------------------------------


def test_cases_of_a_folder(tmp_path: Path) -> None:
    for name in ("b_0000", "a.1_0001", "a.1_0000", "é ü_0000", "odd"):
        (tmp_path / f"{name}{GZ}").touch()
    (tmp_path / "._b_0000.nii.gz").touch()
    (tmp_path / "notes.txt").touch()
    cases, odd = find_cases(tmp_path, GZ)
    assert [case.name for case in cases] == ["a.1", "b", "é ü"]
    assert [file.name for file in cases[0].files] == ["a.1_0000.nii.gz", "a.1_0001.nii.gz"]
    assert list(odd) == ["odd.nii.gz"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "-i"),
        (lambda folder: folder.touch(), "-i"),
        (lambda folder: folder.mkdir(), "CASE_0000.nii.gz"),
        (lambda folder: write_image(folder / "a_0000.mha"), "a_0000.mha"),
        (lambda folder: write_image(folder / "a.nii.gz"), "a.nii.gz"),
    ],
)
def test_folders_without_cases(tmp_path: Path, make: Callable[[Path], object], named: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(UsageError) as error:
        find_cases(tmp_path / "in", GZ)
    assert str(tmp_path / "in") in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("reader", [SimpleITKIO(), NibabelIO()])
def test_channels_are_read_as_by_nnunet(tmp_path: Path, reader: Any) -> None:
    files = tuple(write_image(tmp_path / name, seed, SIZE) for seed, name in enumerate((T1, T2)))
    change(Origin=(-17.501, 3.251, 120.125))(files[1])  # rounding in headers is no other grid
    data, properties = read_case(Case("a", files), reader, MODEL)
    expected, its_properties = reader.read_images([str(file) for file in files])
    np.testing.assert_array_equal(data, expected)
    assert data.dtype == expected.dtype and repr(properties) == repr(its_properties)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_inside(file: Path) -> None:
    """The voxels are cut off, the gzip around them is whole."""
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1000]))


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    file.write_bytes(content)


def put_nan(file: Path) -> None:
    volume = nibabel.load(file)
    voxels = volume.get_fdata(dtype=np.float32)
    voxels[0, 0, :2] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(voxels, volume.affine), file)


def change(**setters: object) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        volume = sitk.ReadImage(str(file))
        for name, value in setters.items():
            getattr(volume, f"Set{name}")(value)
        sitk.WriteImage(volume, str(file))

    return apply


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), T2),
    "truncated": (cut, T2),
    "truncated inside": (cut_inside, T2),
    "damaged": (damage, T2),
    "text": (lambda file: file.write_text("no image"), T2),
    "a broken link": (lambda file: (file.unlink(), file.symlink_to("nowhere")), T2),
    "NaN": (put_nan, "2 voxels"),
    "no data": (lambda file: sitk.WriteImage(sitk.ReadImage(str(file)) * 0 - 3.4e38, str(file)), "beyond 1e+15"),
    "size": (lambda file: write_image(file, size=(40, 35, 5)), "shape ((5, 36, 40) and (5, 35, 40))"),
    "spacing": (change(Spacing=(0.9, 1.1, 2.0)), "spacing"),
    "origin": (change(Origin=(0.0, 3.25, 120.125)), "origin"),
    "direction": (change(Direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)), "direction"),
    "too few": (lambda file: file.unlink(), "T1, T2"),
    "too many": (lambda file: write_image(file.with_name("a_0002.nii.gz"), 0, SIZE), "3 channels"),
    "a gap": (lambda file: file.rename(file.with_name("a_0003.nii.gz")), "[0, 3]"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_cases(tmp_path: Path, what: str) -> None:
    for seed, name in enumerate((T1, T2)):
        write_image(tmp_path / name, seed, SIZE)
    spoil, named = BAD[what]
    spoil(tmp_path / T2)
    (case,), _ = find_cases(tmp_path, GZ)
    with pytest.raises(CaseError) as error:
        read_case(case, SimpleITKIO(), MODEL)
    assert named in str(error.value)


def test_channels_in_one_4d_file_can_be_predicted(tmp_path: Path) -> None:
    """nnU-Net's writer refuses the properties that its reader gives for such a file."""
    one, two = (write_image(tmp_path / name, seed, SIZE) for seed, name in enumerate((T1, T2)))
    both = tmp_path / "b_0000.nii.gz"
    voxels = np.stack([nibabel.load(file).get_fdata(dtype=np.float32) for file in (one, two)], -1)
    nibabel.save(nibabel.Nifti1Image(voxels, nibabel.load(one).affine), both)
    reader = SimpleITKIO()
    data, properties = read_case(Case("b", (both,)), reader, MODEL)
    apart, of_one = read_case(Case("a", (one, two)), reader, MODEL)
    np.testing.assert_array_equal(data, apart)
    reader.write_seg((data[0] > 0).astype(np.uint8), str(tmp_path / "b.nii.gz"), properties)
    reader.write_seg((data[0] > 0).astype(np.uint8), str(tmp_path / "a.nii.gz"), of_one)
    written, expected = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in "ba")
    assert written.GetSize() == expected.GetSize()
    np.testing.assert_allclose(written.GetDirection(), expected.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(written.GetOrigin(), expected.GetOrigin(), atol=1e-3)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_voxels_of_another_unit_are_refused_before_they_are_resampled(tmp_path: Path, factor: float) -> None:
    plans = plain_plans()
    plans["original_median_spacing_after_transp"] = [5.0, 1.0, 1.0]
    manager = PlansManager(plans)
    for name in (T1, T2):
        write_image(tmp_path / name, 0, SIZE)
        change(Spacing=(factor, factor, 5 * factor))(tmp_path / name)
    case = Case("a", (tmp_path / T1, tmp_path / T2))
    settings = manager.get_configuration("3d_fullres")
    with pytest.raises(CaseError, match="unit"):
        preprocess_case(case, None, manager, settings, MODEL, verbose=False)


def test_an_image_that_its_header_places_twice_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate((T1, T2)):
        file = write_image(tmp_path / name, seed, SIZE)
        volume = nibabel.load(file)
        moved = volume.affine.copy()
        moved[0, 3] += 30
        volume.set_qform(moved, 1)
        nibabel.save(nibabel.Nifti1Image(volume.get_fdata(dtype=np.float32), None, volume.header), file)
    read_case(Case("a", (tmp_path / T1, tmp_path / T2)), SimpleITKIO(), MODEL)
    assert "30 mm" in (said := capfd.readouterr().out) and T1 in said


# --- files that are whole ---------------------------------------------------------------------------------------------


def write_prediction(target: Path) -> None:
    """What nnU-Net's export writes, in its order."""
    np.savez_compressed(f"{target}.npz", probabilities=np.random.default_rng(0).random((2, 5, 6, 7)))
    Path(f"{target}.pkl").write_bytes(pickle.dumps({"spacing": [1, 1, 1]}))
    sitk.WriteImage(sitk.Cast(image(0, SIZE) > 0, sitk.sitkUInt8), f"{target}{GZ}")


@pytest.fixture
def out(tmp_path: Path) -> Predictions:
    return Predictions(tmp_path / "out", GZ, SimpleITKIO(), probabilities=True)


def test_a_draft_replaces_what_was_there_once_it_is_whole(out: Predictions) -> None:
    for _ in range(2):
        with out.draft("case.1") as name:
            write_prediction(name)
        assert out.is_whole("case.1") and not out.is_whole("other")
    before = {file: file.read_bytes() for file in out.files("case.1")}
    assert [file.name for file in before] == ["case.1.npz", "case.1.pkl", "case.1.nii.gz"]
    with pytest.raises(ValueError, match="broken"), out.draft("case.1") as name:
        Path(f"{name}{GZ}").write_bytes(b"half")
        raise ValueError("broken")
    assert {file: file.read_bytes() for file in out.folder.iterdir()} == before


@pytest.mark.parametrize("what", [*range(3), "missing", "half"])
def test_what_is_not_whole_is_not_done(out: Predictions, what: int | str) -> None:
    out.folder.mkdir()
    write_prediction(out.folder / "case")
    assert out.is_whole("case")
    if isinstance(what, int):
        cut(out.files("case")[what])
    elif what == "missing":
        out.files("case")[0].unlink()
    else:  # of the archive's member
        damage(out.files("case")[0])
    assert not out.is_whole("case")
    assert replace(out, probabilities=False).is_whole("case") == (what != 2)


def test_the_spacing_beside_a_tiff_comes_and_goes_with_it(tmp_path: Path) -> None:
    out = Predictions(tmp_path / "out", ".tif", Tiff3DIO())
    with out.draft("case") as name:
        out.reader.write_seg(np.ones((4, 5, 6), np.uint8), f"{name}.tif", {"spacing": [5.0, 0.5, 0.25]})
    assert out.is_whole("case") and sorted(path.name for path in out.folder.iterdir()) == ["case.json", "case.tif"]
    assert out.reader.read_seg(str(out.folder / "case.tif"))[1]["spacing"] == [5.0, 0.5, 0.25]
    out.remove("case")
    assert list(out.folder.iterdir()) == []


def test_a_full_disk_ends_the_batch(out: Predictions) -> None:
    with pytest.raises(UsageError, match=str(out.folder)), out.draft("a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # ITK reports no error; what it wrote cannot be read.
    with pytest.raises(UsageError, match=str(out.folder)), out.draft("a") as a:
        write_prediction(a)
        cut(Path(f"{a}{GZ}"))
    assert list(out.folder.iterdir()) == []


# --- post-processing --------------------------------------------------------------------------------------------------


def write_postprocessing(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    arguments = [{"labels_or_regions": [np.int64(1), np.int64(2)]}, {"labels_or_regions": np.int64(1)}]
    file.write_bytes(pickle.dumps(([remove_all_but_largest_component_from_segmentation] * 2, arguments)))
    return file


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MASKSAM_EVIL"],)


def test_postprocessing_runs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_EVIL", str(tmp_path / "evil"))
    file = tmp_path / "postprocessing.pkl"
    for content in (pickle.dumps(([Evil()], [{}])), pickle.dumps(([shutil.rmtree], [{}])), b"\x80", pickle.dumps(3)):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=str(file)):
            read_postprocessing(file)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UsageError, match=r"none\.pkl"):
        read_postprocessing(tmp_path / "none.pkl")


def test_postprocessing_auto(tmp_path: Path) -> None:
    a, b = tmp_path / "A__P__c", tmp_path / "B__P__c"
    one = write_postprocessing(a / "crossval_results_folds_0_1" / "postprocessing.pkl")
    pair = write_postprocessing(tmp_path / "ensembles" / "ensemble___B__P__c___A__P__c___0_1" / "postprocessing.pkl")
    assert find_postprocessing([a], [0, 1]).file == one
    assert find_postprocessing([a, b], [0, 1]).file == pair
    for models, folds, named in (
        ([b], [0, 1], "B__P__c"),
        ([a, b], [0, 1, 2], "0_1_2"),
        ([a, b, tmp_path / "C"], [0, 1], "3 models"),
        ([a], ["all"], "all"),
    ):
        with pytest.raises(UsageError, match=named):
            find_postprocessing(models, folds)


# --- members ----------------------------------------------------------------------------------------------------------


def test_members_as_in_the_benchmark() -> None:
    texts = ["nnunet", "resenc-l:2d", "MaskSAMTrainer@MaskSAMPlans:3d_lowres", "MaskSAMTrainer_tiny"]
    members = parse_members(texts, "SomePlans", "3d_fullres")
    assert [member.key for member in members] == [
        "nnUNetTrainer__nnUNetPlans__3d_fullres",
        "nnUNetTrainer__nnUNetResEncUNetLPlans__2d",
        "MaskSAMTrainer__MaskSAMPlans__3d_lowres",
        "MaskSAMTrainer_tiny__SomePlans__3d_fullres",
    ]


@pytest.mark.parametrize(
    ("texts", "configuration", "named"),
    [
        ("nnunet MaskSAMTrainer:2d", "", "nnunet"),
        ("nnunet:2d MaskSAMTrainer:", "2d", "MaskSAMTrainer:"),
        ("nnunet@:2d MaskSAMTrainer:2d", "", "nnunet@"),
        ("nnunet nnUNetTrainer@nnUNetPlans:2d", "2d", "nnUNetTrainer@nnUNetPlans:2d"),
        ("nnunet", "2d", "nnunet"),
        ("nnunet MaskSAMTrainr", "2d", "MaskSAMTrainr"),
    ],
)
def test_members_that_make_no_ensemble(texts: str, configuration: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"--ensemble.*{named}"):
        parse_members(texts.split(), "nnUNetPlans", configuration)
