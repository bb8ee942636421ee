"""Fuzzing of what users hand in: no crash without a clear error, no memory for what a header claims, nothing written
outside the target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from configs import UNET, tiny_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import json_values, mutated, nifti_files
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from plain_plans import DATASET, dataset_json, plain_plans, region_dataset_json

from masksam_nnunet.config import ConfigError, LossConfig, MaskSAMConfig, UNetConfig
from masksam_nnunet.errors import DataError
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.plans.architecture import open_configuration, write_config
from masksam_nnunet.plans.datasets.conversion import Download, DownloadedCase, require_sound
from masksam_nnunet.plans.images import check_whole
from masksam_nnunet.plans.planner import _read_plans
from masksam_nnunet.plans.raw_data import description_defects
from masksam_nnunet.plans.splits import overlaps, read_splits

DEFAULT, LONG = 150, 20_000
"""Inputs of each kind: here and in ``make test-long``."""


def masksam_plans() -> dict[str, Any]:
    plans = plain_plans((3, 32, 48))
    write_config(plans, "3d_fullres", tiny_config())
    return plans


def dumped(value: Any, folder: Path) -> Path:
    """A file of JSON as Python writes it: NaN and large numbers too."""
    file = folder / "splits_final.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


# --- what is fuzzed: inputs, and what must hold of each -----------------------------------------------------


def config(value: Any, folder: Path) -> None:
    for kind in (MaskSAMConfig, LossConfig, UNetConfig):
        try:
            made = kind.from_json(value)
        except ConfigError:
            continue
        assert kind.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made


def plans(value: Any, folder: Path) -> None:
    name = "3d_fullres"
    with suppress(ConfigError):
        _, found = open_configuration(value, name)
        assert found is None or isinstance(found, MaskSAMConfig)
    with suppress(DataError):
        assert _read_plans(dumped(value, folder), DATASET)["dataset_name"] == DATASET


def description(value: Any, folder: Path) -> None:
    """What passes is what nnU-Net takes."""
    if description_defects(value):
        return
    manager = LabelManager(dict(value["labels"]), value.get("regions_class_order"))
    found = [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])]
    assert (np.ediff1d(found) == 1).all() and len(manager.all_labels) > 1  # as its verify_dataset_integrity has it
    assert Classes.from_dataset_json(value).foreground


def splits(value: Any, folder: Path) -> None:
    with suppress(DataError):
        overlaps(read_splits(dumped(value, folder), "abcde"))


def nifti(content: bytes, folder: Path) -> None:
    file = folder / "case.nii.gz"
    file.write_bytes(content)
    with pytest.raises((DataError, NothingWrong)):
        found = read_label_map(folder, "case", dataset_json())
        assert found.labels.ndim == 3 and np.isfinite(found.grid.spacing).all() and min(found.grid.spacing) > 0
        raise NothingWrong
    with pytest.raises((DataError, NothingWrong)):
        require_sound(
            Download(folder, "", "Fuzzed", [DownloadedCase("case", file, file)], ["CT"], {"a": 0, "b": 1, "c": 2})
        )
        raise NothingWrong
    try:
        check_whole(file)
        image = sitk.ReadImage(str(file))  # what has passed has the size that its bytes pay for
    except (DataError, RuntimeError):  # ITK's: directions that are none, more than five dimensions
        return
    assert math.prod(image.GetSize()) <= len(WHOLE)


class NothingWrong(Exception):
    """The input was good."""


WHOLE = nibabel.Nifti1Image(
    np.arange(60, dtype=np.uint8).reshape(5, 4, 3) % 3, np.diag([1.0, 2.0, 3.0, 1.0])
).to_bytes()
FOLDS = [{"train": ["a", "b", "c"], "val": ["d"]}, {"train": ["a", "d"], "val": ["b", "c"]}]
KINDS: dict[str, tuple[Callable[[Any, Path], None], st.SearchStrategy[Any]]] = {
    "config": (
        config,
        mutated(tiny_config().to_json())
        | mutated(tiny_config(generator=UNET).to_json())
        | mutated(LossConfig().to_json())
        | mutated(UNET.to_json())
        | json_values,
    ),
    "plans": (plans, mutated(masksam_plans()) | mutated(plain_plans()) | json_values),
    "dataset.json": (
        description,
        mutated(dataset_json(4) | {"numTraining": 3})
        | mutated(region_dataset_json(ignore=True) | {"numTraining": 3})
        | json_values,
    ),
    "splits_final.json": (splits, mutated(FOLDS) | json_values),
    "NIfTI": (nifti, nifti_files(WHOLE)),
}


def fuzz(kind: str, number: int, folder: Path, derandomize: bool) -> None:
    check, inputs = KINDS[kind]
    count = 0

    @settings(
        max_examples=number,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        nonlocal count
        count += 1
        place = folder / str(count)
        place.mkdir()
        check(value, place)

    one()
    print(f"{kind}: {count} inputs")
    assert count >= number


@pytest.fixture(autouse=True)
def quiet() -> None:
    sitk.ProcessObject.GlobalWarningDisplayOff()  # ITK tells of every odd header


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_crashes(kind: str, tmp_path: Path) -> None:
    fuzz(kind, DEFAULT, tmp_path, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_crashes_in_many_more(kind: str, tmp_path: Path) -> None:
    fuzz(kind, LONG, tmp_path, derandomize=False)


def test_what_was_not_changed_is_taken(tmp_path: Path) -> None:
    """Else the fuzzing would show no more than that everything is refused."""
    assert MaskSAMConfig.from_json(tiny_config().to_json()) == tiny_config()
    assert open_configuration(masksam_plans(), "3d_fullres")[1] == tiny_config()
    assert open_configuration(plain_plans(), "3d_fullres")[1] is None
    for content in (dataset_json(4), region_dataset_json(ignore=True)):
        assert description_defects(content | {"numTraining": 3}) == []
    assert overlaps(read_splits(dumped(FOLDS, tmp_path), "abcde")) == []
    (tmp_path / "case.nii.gz").write_bytes(WHOLE)
    assert read_label_map(tmp_path, "case", dataset_json()).labels.shape == (3, 4, 5)
