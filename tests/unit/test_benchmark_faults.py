"""Errors that name the file of a fold, what nnU-Net's post-processing did, and marks of what is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from masksam_nnunet.benchmarks import combine, test_set
from masksam_nnunet.benchmarks.combine import Combined
from masksam_nnunet.benchmarks.evaluate import _naming_faults
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.label_maps import Classes

METHODS = (Method("A", "P", "3d_fullres"), Method("B", "P", "3d_fullres"))
DATASET = {"labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}


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
