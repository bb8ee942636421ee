"""Predictions that nnU-Net's functions stumble over, named by the fold's file; and what its post-processing did."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from masksam_nnunet.benchmarks import combine, test_set
from masksam_nnunet.benchmarks.combine import Combined
from masksam_nnunet.benchmarks.evaluate import _naming_faults
from masksam_nnunet.benchmarks.faults import faulty_prediction
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.label_maps import Classes

METHODS = (Method("A", "P", "3d_fullres"), Method("B", "P", "3d_fullres"))
CASES = {0: ("a", "b"), 1: ("c",)}
DATASET = {"labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
LABELS = np.zeros((4, 5, 6), np.uint8)
LABELS[1:3, 2:4, 2:5] = 1


def write(file: Path, labels: NDArray[Any] = LABELS, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


@pytest.fixture
def find(tmp_path: Path) -> Callable[[], str | None]:
    for fold, cases in CASES.items():
        for case in cases:
            write(tmp_path / "truths" / f"{case}.nii.gz")
            for method in METHODS:
                write(tmp_path / method.key / f"fold_{fold}" / "validation" / f"{case}.nii.gz")
    return partial(faulty_prediction, METHODS, CASES, tmp_path, tmp_path / "truths", DATASET)


def spacing(file: Path) -> None:
    write(file, spacing=(1.0, 1.0, 3.0))


def shape(file: Path) -> None:
    write(file, LABELS[:-1])


def nan(file: Path) -> None:
    write(file, np.where(LABELS, np.float32("nan"), np.float32(0)))


def value(file: Path) -> None:
    write(file, 2 * LABELS)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spacing, "spacing of truth and prediction differ"),
        (shape, "shape of truth and prediction differ"),
        (nan, "NaN"),
        (value, "holds the label values 2"),
        (cut, "cannot be read"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_faulty_prediction_is_named(
    tmp_path: Path, find: Callable[[], str | None], spoil: Callable[[Path], None], message: str
) -> None:
    assert find() is None
    file = tmp_path / METHODS[1].key / "fold_1" / "validation" / "c.nii.gz"
    spoil(file)
    told = find()
    assert told is not None and message in told and "'c'" in told
    assert f"remove {file} and run masksam benchmark again" in told


def test_errors_name_the_faulty_file_if_there_is_one() -> None:
    with pytest.raises(BenchmarkError, match=r"^the file$"), _naming_faults(lambda: "the file"):
        raise BenchmarkError("shapes (1, 2) and (1, 3)")
    with pytest.raises(BenchmarkError, match=r"^no space left$"), _naming_faults(lambda: None):
        raise BenchmarkError("no space left")


@pytest.mark.parametrize(
    ("labels", "kept", "expected"),
    [
        ({"background": 0, "a": 1, "b": 2}, [[1, 2], 1, 2], ["the whole foreground", "a", "b"]),
        ({"background": 0, "a": 1}, [[1], 1], ["a"]),
        ({"background": 0, "whole": [1, 2], "core": 2}, [[1, 2], [2]], ["whole", "core"]),
        ({"background": 0, "a": 1, "b": 2, "c": 3}, [[2, 3]], ["the labels 2, 3"]),
        ({"background": 0, "a": 1}, [], []),
    ],
)
def test_what_post_processing_keeps_is_named(
    tmp_path: Path, labels: dict[str, Any], kept: list[Any], expected: list[str]
) -> None:
    chosen = [{"labels_or_regions": one} for one in kept]
    (tmp_path / "postprocessing.json").write_text(json.dumps({"postprocessing_kwargs": chosen}))
    order = {"regions_class_order": [1, 2]} if "whole" in labels else {}
    classes = Classes.from_dataset_json({**DATASET, **order, "labels": labels})
    assert Combined((METHODS[0],), tmp_path).postprocessing(classes) == expected


@pytest.mark.parametrize("content", [None, "", "[]", '{"stamp": "a"'])
def test_marks_that_cannot_be_read_count_for_nothing(tmp_path: Path, content: str | None) -> None:
    mark = tmp_path / "mark.json"
    if content is not None:
        mark.write_text(content)
    assert combine._remembered(mark) == {}
    assert not test_set._remembered(mark)
    mark.write_text('{"stamp": "a"}')
    assert combine._remembered(mark) == test_set._remembered(mark) == {"stamp": "a"}
