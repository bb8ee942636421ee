"""2d, 3d_fullres, 3d_lowres and the cascade, on nnU-Net's plans, on residual encoder plans and on MaskSAM's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kinds_of_data import Kind, assert_like_the_input
from nnunet_workspace import Workspace

pytestmark = pytest.mark.integration
TRAINER = "ShortMaskSAM"
KIND = Kind(
    id=31,
    name="Cascade",
    sizes=[(40, 64, 64)] * 2,
    labels={"background": 0, "first": 1, "second": 2},
    values=(1, 2),
)
DEVICE = ("-device", "cpu")
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
        ["nnUNetv2_preprocess", *d, "-plans_name", RESENC, "-c", "3d_lowres", "-np", 1],
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


@pytest.mark.parametrize("plans", ["nnUNetPlans", RESENC, "MaskSAMPlans"])
def test_all_configurations(planned: Workspace, plans: str, tmp_path: Path) -> None:
    d = str(KIND.id)
    images = planned.raw / KIND.dataset / "imagesTr"
    low, cascade = tmp_path / "low", tmp_path / "cascade"
    model = ("-p", plans, "-tr", TRAINER, *DEVICE)
    command = ("masksam", "predict", "--batch-size", 3) if plans == "MaskSAMPlans" else ("nnUNetv2_predict",)
    predict = (*command, "-i", images, "-d", d, *model, "-npp", 1, "-nps", 1, "--disable_tta")
    for configuration in ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"):
        # nnU-Net plans batches for 2d that take a CPU minutes a step.
        file = planned.preprocessed / KIND.dataset / f"{plans}.json"
        content = json.loads(file.read_text())
        content["configurations"][configuration]["batch_size"] = 2
        file.write_text(json.dumps(content))
    planned.run_all(
        ["nnUNetv2_train", d, "2d", 0, *model],
        ["nnUNetv2_train", d, "3d_fullres", 0, *model],
        ["nnUNetv2_train", d, "3d_lowres", 0, *model],
        ["nnUNetv2_train", d, "3d_lowres", 1, *model],
        ["nnUNetv2_train", d, "3d_cascade_fullres", 0, *model],
        [*predict, "-c", "3d_lowres", "-o", low, "-f", *((0, 1) if plans == "MaskSAMPlans" else (0,))],
        [*predict, "-c", "3d_cascade_fullres", "-o", cascade, "-f", 0, "-prev_stage_predictions", low],
        TEST_MIRRORING="0",
    )
    for folder in (low, cascade):
        assert_like_the_input(images, folder, KIND)
    for configuration in ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"):
        fold = planned.results / KIND.dataset / f"{TRAINER}__{plans}__{configuration}" / "fold_0"
        assert json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
    config = _config(planned, plans, "3d_cascade_fullres")
    assert config["backbone"] == "tiny" and config["num_queries"] >= 3


def _config(workspace: Workspace, plans: str, configuration: str) -> dict[str, object]:
    folder = workspace.results / KIND.dataset / f"{TRAINER}__{plans}__{configuration}"
    content = json.loads((folder / "plans.json").read_text())["configurations"]
    architecture = content[configuration].get("architecture") or content["3d_fullres"]["architecture"]
    return architecture["arch_kwargs"]["config"]  # type: ignore[no-any-return]
