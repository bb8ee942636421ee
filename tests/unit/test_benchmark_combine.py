"""Errors that name the file of a fold, and what nnU-Net's post-processing keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from masksam_nnunet.benchmarks.combine import Combined
from masksam_nnunet.benchmarks.evaluate import _naming_faults
from masksam_nnunet.benchmarks.results import Method
from masksam_nnunet.errors import DataError
from masksam_nnunet.inference.label_maps import Classes

METHOD = Method("A", "P", "3d_fullres")
DATASET = {"labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}


def test_errors_name_the_faulty_file_if_there_is_one() -> None:
    with pytest.raises(DataError, match=r"^the file$"), _naming_faults(lambda: "the file"):
        raise DataError("shapes (1, 2) and (1, 3)")
    with pytest.raises(DataError, match=r"^no space left$"), _naming_faults(lambda: None):
        raise DataError("no space left")


@pytest.mark.parametrize(
    ("labels", "kept", "expected"),
    [
        ({"background": 0, "a": 1, "b": 2}, [[1, 2], 1, 2], ["the whole foreground", "a", "b"]),
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
    assert Combined((METHOD,), tmp_path).postprocessing(classes) == expected
