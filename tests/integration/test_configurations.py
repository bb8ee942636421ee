"""2d, 3d_fullres, 3d_lowres and the cascade, on nnU-Net's plans, on residual encoder plans and on MaskSAM's."""

from __future__ import annotations

import json

import pytest
from kinds_of_data import Kind, assert_like_the_input
from nnunet_workspace import Workspace

TRAINER = "ShortMaskSAM"
KIND = Kind(
    id=31,
    name="Cascade",
    sizes=[(40, 64, 64)] * 2,
    labels={"background": 0, "first": 1, "second": 2},
    values=(1, 2),
)
LITTLE = ("-gpu_memory_target", "0.05")  # GB: nnU-Net then plans a patch so small that it wants a cascade
RESENC = "nnUNetResEncUNetMPlans"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """All three plans, preprocessed; two folds whose validation sets cover all cases, as a cascade needs."""
    workspace = Workspace(tmp_path_factory.mktemp("configurations"))
    KIND.write(workspace.raw)
    one, other = KIND.cases
    splits = [{"train": [a], "val": [b]} for a, b in ((one, other), (other, one))]
    (workspace.raw / KIND.dataset / "splits_final.json").write_text(json.dumps(splits))
    d = ("-d", str(KIND.id))
    output = workspace.run_all(
        ["nnUNetv2_plan_and_preprocess", *d, *LITTLE, "-np", 1, "-npfp", 1],
        ["nnUNetv2_plan_experiment", *d, *LITTLE, "-pl", "nnUNetPlannerResEncM"],
        ["masksam", "plan", *d, "--backbone", "tiny"],
    )
    assert "No preprocessing is needed" in output
    return workspace


def test_masksam_plans_share_nnunets_data(planned: Workspace) -> None:
    folder = planned.preprocessed / KIND.dataset
    ours, theirs = (
        json.loads((folder / f"{name}.json").read_text())["configurations"] for name in ("MaskSAMPlans", "nnUNetPlans")
    )
    assert set(ours) == set(theirs) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    for name in ("2d", "3d_fullres", "3d_lowres"):
        for key in set(theirs[name]) - {"patch_size", "batch_size", "architecture"}:
            assert ours[name][key] == theirs[name][key], (name, key)
        assert ours[name]["architecture"]["network_class_name"] == "masksam_nnunet.modeling.MaskSAM"
    assert ours["3d_cascade_fullres"] == theirs["3d_cascade_fullres"]


def test_all_configurations(planned: Workspace) -> None:
    """Each of nnU-Net's configurations on MaskSAM's plans, and ResEnc's plans without MaskSAM's."""
    d, images = str(KIND.id), planned.raw / KIND.dataset / "imagesTr"
    cascade = ["3d_lowres all", "3d_cascade_fullres 0"]  # the second needs the first's predictions of all cases
    wanted = {RESENC: ["3d_fullres 0"], "MaskSAMPlans": ["2d 0", *cascade]}
    commands: list[list[object]] = []
    for plans, folds in wanted.items():
        file = planned.preprocessed / KIND.dataset / f"{plans}.json"
        content = json.loads(file.read_text())
        for configuration in content["configurations"].values():
            configuration["batch_size"] = 2  # nnU-Net plans batches for 2d that take a CPU minutes a step
        file.write_text(json.dumps(content))
        model = ("-p", plans, "-tr", TRAINER, "-device", "cpu")
        commands += [["nnUNetv2_train", d, *fold.split(), *model] for fold in folds]
        if cascade[0] not in folds:
            continue
        predict = ("masksam", "predict", "--batch-size", 3, "--disable_tta", "-i", images, "-d", d, *model)
        low, high = planned.root / plans / "low", planned.root / plans / "high"
        commands += [
            [*predict, "-npp", 1, "-nps", 1, "-c", "3d_lowres", "-o", low, "-f", "all"],
            [*predict, "-npp", 0, "-nps", 0, "-c", "3d_cascade_fullres", "-o", high, "-f", 0,
             "-prev_stage_predictions", low],
        ]  # fmt: skip
    planned.run_all(*commands, TEST_MIRRORING="0")
    for plans, folds in wanted.items():
        for fold in folds:
            configuration, number = fold.split()
            model_folder = planned.results / KIND.dataset / f"{TRAINER}__{plans}__{configuration}"
            summary = json.loads((model_folder / f"fold_{number}" / "validation" / "summary.json").read_text())
            assert summary["metric_per_case"]
            found = json.loads((model_folder / "plans.json").read_text())["configurations"]
            architecture = found[configuration].get("architecture") or found["3d_fullres"]["architecture"]
            assert architecture["arch_kwargs"]["config"]["backbone"] == "tiny"
        if cascade[0] in folds:
            for stage in ("low", "high"):
                assert_like_the_input(images, planned.root / plans / stage, KIND)
