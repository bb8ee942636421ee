"""Whole files and sane headers, against what ITK would make of them."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import psutil
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.images import ImageGeometry, check_whole, stored_floats

VALUES = np.arange(60, dtype=np.float32).reshape(5, 4, 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VALUES, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return path


def test_files_of_one_grid_in_two_orders_lie_alike_for_a_reader_that_turns_them(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    geometries = []
    for name, stored in (("image", image), ("label", turned)):
        nibabel.save(stored, tmp_path / f"{name}.nii.gz")
        geometries.append(ImageGeometry.of(*NibabelIOWithReorient().read_images([str(tmp_path / f"{name}.nii.gz")])))
    assert geometries[0].difference(geometries[1]) is None


def set_header(path: Path, offset: int, form: str, *values: float) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize("form", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_whole_files_pass(tmp_path: Path, form: type, name: str) -> None:
    nibabel.save(form(VALUES, np.eye(4)), tmp_path / name)
    check_whole(tmp_path / name)
    assert np.array_equal(stored_floats(tmp_path / name), VALUES)


def test_content_counts_not_the_name(tmp_path: Path, file: Path) -> None:
    plain = tmp_path / "plain.nii.gz"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    check_whole(plain)
    assert np.array_equal(stored_floats(plain), VALUES)
    picture = tmp_path / "x.png"
    picture.write_bytes(b"no header that is known here")
    check_whole(picture)
    assert stored_floats(picture).size == 0


@pytest.mark.parametrize(
    ("offset", "form", "values"),
    [
        (40, "<8h", [7, *[32767] * 7]),
        (40, "<8h", [3, -5, 4, 3, 1, 1, 1, 1]),
        (40, "<h", [0]),
        (70, "<h", [999]),  # an unknown type
        (70, "<h", [64]),  # longer than the file: ITK takes the end from elsewhere in memory
        (70, "<h", [128]),  # colours
        (80, "<f", [0.0]),  # ITK takes a voxel size of 0 for 1
        (80, "<f", [math.nan]),
        (108, "<f", [0.0]),  # ITK is one voxel off
        (108, "<f", [math.nan]),
        (112, "<ff", [2.0, math.nan]),  # scaling, found by fuzzing
        (280, "<f", [math.nan]),  # placement
        (344, "<4s", [b"ni1\0"]),
        (0, "<i", [349]),
    ],
)
def test_impossible_headers(file: Path, offset: int, form: str, values: list[float]) -> None:
    set_header(file, offset, form, *values)
    with pytest.raises(DataError, match=file.name):
        check_whole(file)


@pytest.mark.parametrize("left", [0, 1, 9, 0.5, -1])
def test_cut_off_streams(file: Path, left: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(DataError):
        check_whole(file)


def test_volumes_that_no_memory_holds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    with pytest.raises(DataError, match="memory"):
        check_whole(file)


def test_itk_reads_nan_as_zero_and_stored_floats_do_not(file: Path) -> None:
    values = VALUES.copy()
    values[0, 0, 0] = math.nan
    values[4, 3, 2] = math.inf
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    check_whole(file)
    seen = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    assert np.isfinite(seen).all()  # why this module exists
    assert np.count_nonzero(~np.isfinite(stored_floats(file))) == 2
