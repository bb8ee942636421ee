"""Every kind of data through nnU-Net's commands and ours: planned, trained a few steps, predicted, exported."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from kinds_of_data import Kind, assert_like_the_input
from nnunet_workspace import Workspace

TRAINER = "ShortMaskSAM"

KINDS = [
    Kind(
        # Regions with an ignore label, four channels, strong anisotropy, sizes below and above the patch, a case
        # without any foreground; letters beyond ASCII, spaces and brackets in all names.
        id=21,
        name="Größe",
        case="Fall é {:02d}",
        sizes=[(8, 40, 36), (5, 24, 20), (8, 40, 36), (9, 44, 40), (8, 40, 36), (10, 60, 48)],
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "Niere [links]": 3, "ignore": 4},
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
    "kind", [pytest.param(kind, id=str(kind.id), marks=[pytest.mark.long] * (kind.id == 22)) for kind in KINDS]
)
def test_plan_train_validate_predict_export(kind: Kind, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "Ä b'c [1] 数据")
    raw = kind.write(workspace.raw)
    configuration = "2d" if kind.sizes[0][0] == 1 else "3d_fullres"
    out, archive = workspace.root / "aus gabe", workspace.root / "Modell é.zip"
    d = str(kind.id)
    planned = ("-p", "MaskSAMPlans", "-tr", TRAINER)
    one_fold = ("-d", d, "-c", configuration, "-f", 0, *planned)
    plan = ["masksam", "plan", "-d", d, "-c", configuration, "--backbone", "tiny"]
    if kind.name == "Pictures":  # without nnU-Net's plans: MaskSAM's are preprocessed for by themselves
        plan += ["--generator", "unet"]
        prepare = [
            ["nnUNetv2_extract_fingerprint", "-d", d, "-np", 1, "--verify_dataset_integrity"],
            plan,
            ["nnUNetv2_preprocess", "-d", d, "-plans_name", "MaskSAMPlans", "-c", configuration, "-np", 1],
        ]
        said = f"nnUNetv2_preprocess -d {d} -plans_name MaskSAMPlans -c {configuration}"
        train, predict = ["nnUNetv2_train"], ["nnUNetv2_predict"]
    else:
        prepare = [
            ["masksam", "check", "-d", d],
            ["nnUNetv2_plan_and_preprocess", "-d", d, "-c", configuration, "-np", 1, "-npfp", 1,
             "--verify_dataset_integrity"],
            plan,
        ]  # fmt: skip
        said = "No preprocessing is needed"
        train, predict = ["masksam", "train"], ["masksam", "predict"]
    output = workspace.run_all(
        *prepare,
        [*train, d, configuration, 0, *planned, "-device", "cpu"],
        [*predict, "-i", raw / "imagesTr", "-o", out, *one_fold, "-device", "cpu", "-npp", 0, "-nps", 0,
         "--disable_tta"],
        ["masksam", "export", *one_fold, "-o", archive],
        TEST_MIRRORING="0",
    )  # fmt: skip
    assert said in output
    assert (workspace.preprocessed / kind.dataset / "nnUNetPlans.json").is_file() == (kind.name != "Pictures")
    model = workspace.results / kind.dataset / f"{TRAINER}__MaskSAMPlans__{configuration}"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1 + (len(kind.sizes) > 5)
    assert_like_the_input(raw / "imagesTr", out, kind)
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        assert f"{kind.dataset}/{model.name}/fold_0/checkpoint_final.pth" in opened.namelist()
