"""Related methods through nnU-Net's commands and ours: planned, trained, compared, predicted, exported."""

from __future__ import annotations

import json

import numpy as np
import SimpleITK as sitk
from nnunet_workspace import Dataset, Workspace

METHODS = ("MASAMTrainer_budget", "NnSAMTrainer_budget")
PLANS = "RelatedPlans"


def test_the_whole_way(workspace: Workspace, dataset: Dataset) -> None:
    out, images = workspace.root / "related", workspace.root / "related" / "images"
    images.mkdir(parents=True)
    name = f"{dataset.cases[0]}_0000.nii.gz"
    (images / name).symlink_to(workspace.raw / dataset.name / "imagesTr" / name)
    one = ["-d", dataset.id, "-c", "3d_fullres", "-tr", METHODS[0], "-p", PLANS, "-f", 0]
    cpu, plain = ["-device", "cpu"], ["-npp", 0, "-nps", 0, "--disable_tta"]
    workspace.run_all(
        ["masksam", "plan", "-d", dataset.id, "-c", "3d_fullres", "--backbone", "tiny", "--plans-name", PLANS],
        ["masksam", "benchmark", "-d", dataset.id, "-f", 0, "--trainers", *(f"{m}@{PLANS}" for m in METHODS),
         "--iterations", 6, *cpu, "--no-ensembles", "--no-postprocessing", "--out", out / "report"],
        ["nnUNetv2_predict", "-i", images, "-o", out / "stock", *one, *cpu, *plain],
        ["masksam", "export", *one, "-o", out / "portable", "--format", "safetensors"],
        ["masksam", "predict", "-i", images, "-o", out / "ours", "--model", out / "portable", *cpu, *plain],
    )  # fmt: skip
    scores = (out / "report" / "scores.csv").read_text()
    assert all(method in scores for method in METHODS)
    for method in METHODS:
        model = workspace.model(dataset.name, method, PLANS)
        plans = json.loads((model / "plans.json").read_text())
        config = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["config"]
        assert method.lower().startswith(config["method"].replace("_", ""))
    stock, ours = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(out / folder / f"{dataset.cases[0]}.nii.gz")))
        for folder in ("stock", "ours")
    )
    np.testing.assert_array_equal(stock, ours)


def test_slices(workspace: Workspace, dataset: Dataset) -> None:
    of_slices = [dataset.id, "2d", 0, "-tr", "HSAMTrainer_budget", "-p", "SlicePlans", "-device", "cpu"]
    plans = ["-plans_name", "SlicePlans", "-c", "2d", "-np", 2]
    workspace.run_all(
        ["masksam", "plan", "-d", dataset.id, "-c", "2d", "--backbone", "tiny", "--plans-name", "SlicePlans"],
        ["nnUNetv2_preprocess", "-d", dataset.id, *plans],
        ["nnUNetv2_train", *of_slices],
        MASKSAM_BUDGET_ITERATIONS="6",
    )
    fold = workspace.results / dataset.name / "HSAMTrainer_budget__SlicePlans__2d" / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()
