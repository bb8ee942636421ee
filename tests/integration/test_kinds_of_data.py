"""Every kind of data through nnU-Net's own commands: planned, trained a few steps, validated, predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kinds_of_data import Kind, assert_like_the_input
from nnunet_workspace import Workspace

pytestmark = pytest.mark.integration
TRAINER = "ShortMaskSAM"

KINDS = [
    Kind(
        # Regions with an ignore label, four channels, strong anisotropy, sizes below and above the patch, a case
        # without any foreground.
        id=21,
        name="Regions",
        sizes=[(8, 40, 36), (5, 24, 20), (8, 40, 36), (9, 44, 40), (8, 40, 36), (10, 60, 48)],
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "centre": 3, "ignore": 4},
        values=(1, 2, 3),
        channels=4,
        spacing=(0.8, 0.8, 6.0),
        empty=(2,),
        ignored=4,
        more={"regions_class_order": [1, 2, 3]},
    ),
    Kind(
        id=22,
        name="ManyLabels",
        sizes=[(12, 40, 40)] * 5,
        labels={"background": 0, **{f"organ {value}": value for value in range(1, 121)}},
        values=tuple(range(1, 121)),
    ),
    Kind(
        # Natural images: three channels in one file.
        id=24,
        name="Pictures",
        sizes=[(1, 50, 64), (1, 64, 48), (1, 50, 64), (1, 72, 60), (1, 50, 64)],
        labels={"background": 0, "ball": 1},
        values=(1,),
        channels=3,
        ending=".png",
    ),
]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.name, marks=[pytest.mark.long] * (kind.id == 22)) for kind in KINDS]
)
def test_plan_train_validate_predict(kind: Kind, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    raw = kind.write(workspace.raw)
    configuration = "2d" if kind.sizes[0][0] == 1 else "3d_fullres"
    out = tmp_path / "out"
    d = str(kind.id)
    planned = ("-p", "MaskSAMPlans", "-tr", TRAINER, "-device", "cpu")
    plan = ["masksam", "plan", "-d", d, "-c", configuration, "--backbone", "tiny"]
    if kind.name == "Pictures":  # without nnU-Net's plans: MaskSAM's are preprocessed for by themselves
        prepare = [
            ["nnUNetv2_extract_fingerprint", "-d", d, "-np", 1, "--verify_dataset_integrity"],
            plan,
            ["nnUNetv2_preprocess", "-d", d, "-plans_name", "MaskSAMPlans", "-c", configuration, "-np", 1],
        ]
        said = f"nnUNetv2_preprocess -d {d} -plans_name MaskSAMPlans -c {configuration}"
    else:
        prepare = [
            ["nnUNetv2_plan_and_preprocess", "-d", d, "-c", configuration, "-np", 1, "-npfp", 1,
             "--verify_dataset_integrity"],
            plan,
        ]  # fmt: skip
        said = "No preprocessing is needed"
    output = workspace.run_all(
        *prepare,
        ["nnUNetv2_train", d, configuration, 0, *planned],
        ["nnUNetv2_predict", "-i", raw / "imagesTr", "-o", out, "-d", d, "-c", configuration, "-f", 0, *planned,
         "-npp", 0, "-nps", 0, "--disable_tta"],
        TEST_MIRRORING="0",
    )  # fmt: skip
    assert said in output
    assert (workspace.preprocessed / kind.dataset / "nnUNetPlans.json").is_file() == (kind.name != "Pictures")
    model = workspace.results / kind.dataset / f"{TRAINER}__MaskSAMPlans__{configuration}"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1 + (len(kind.sizes) > 5)
    assert_like_the_input(raw / "imagesTr", out, kind)
