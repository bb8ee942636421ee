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

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.images import check_whole, stored_floats

VALUES = np.arange(60, dtype=np.float32).reshape(5, 4, 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VALUES, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return path


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


HUGE = [7, *[32767] * 7]


@pytest.mark.parametrize(
    ("offset", "form", "values", "said"),
    [
        (40, "<8h", HUGE, r"holds 592 bytes, its header says \d{33} "),
        (40, "<8h", [3, 4096, 4096, 1000, 1, 1, 1, 1], "its header says 67108864352"),
        (40, "<8h", [3, -5, 4, 3, 1, 1, 1, 1], r"the dimensions \[3, -5, 4, 3"),
        (40, "<h", [0], r"the dimensions \[0, 5, 4, 3"),
        (70, "<h", [999], "the unknown data type 999"),
        (70, "<h", [64], "holds 592 bytes, its header says 832"),  # ITK takes the end from elsewhere in memory
        (70, "<h", [128], "not numbers"),  # colours
        (80, "<f", [0.0], r"the voxel size \[0.0, 2.0, 3.0\]"),  # ITK takes it for 1
        (80, "<f", [math.nan], r"the voxel size \[nan, 2.0, 3.0\]"),
        (108, "<f", [0.0], "voxels begin at byte 0"),  # ITK is one voxel off
        (108, "<f", [math.nan], "voxels begin at byte nan"),
        (108, "<f", [1e30], "holds 592 bytes"),
        (112, "<ff", [2.0, math.nan], "scales voxels by 2 and adds nan"),  # found by fuzzing
        (280, "<f", [math.nan], "places the image at NaN or infinity"),
        (292, "<f", [math.inf], "places the image at NaN or infinity"),
        (344, "<4s", [b"ni1\0"], "no NIfTI header with the data behind it"),
        (0, "<i", [349], "no NIfTI header with the data behind it"),
    ],
)
def test_headers_that_cannot_be(file: Path, offset: int, form: str, values: list[float], said: str) -> None:
    set_header(file, offset, form, *values)
    with pytest.raises(DataError, match=said):
        check_whole(file)


@pytest.mark.parametrize("left", [0, 1, 9, 0.5, -1])
def test_cut_off_streams(file: Path, left: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(DataError):
        check_whole(file)


def test_web_pages_are_shown(file: Path) -> None:
    file.write_bytes(b"<!DOCTYPE html><title>Log in</title>")
    with pytest.raises(DataError, match="begins with b'<!DOCTYPE html>"):
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
