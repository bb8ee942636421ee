"""nnU-Net's own commands with MaskSAM trainers, on plain nnUNetPlans, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunet_workspace import SHORT_TRAINERS, Dataset, Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from segment_anything import sam_model_registry

from masksam_nnunet.config import Z_SCORES
from masksam_nnunet.plans.architecture import config_for, write_config
from masksam_nnunet.sam_files import CHECKPOINTS

MASKSAM, STOCK = "ShortMaskSAM", "ShortNNUNet"


@pytest.fixture(scope="module")
def trained(workspace: Workspace, dataset: Dataset) -> Path:
    """Folds 0 and 1 of MaskSAM and fold 0 of stock nnU-Net, validated with probabilities."""
    workspace.run_all(
        *(
            ["nnUNetv2_train", dataset.id, "3d_fullres", fold, "-tr", trainer, "-device", "cpu", "--npz"]
            for trainer, fold in ((MASKSAM, 0), (MASKSAM, 1), (STOCK, 0))
        )
    )
    return workspace.model(dataset.name, MASKSAM)


@pytest.fixture(scope="module")
def images(workspace: Workspace, dataset: Dataset) -> Path:
    """Two images to predict, each a window."""
    folder = workspace.root / "to_predict"
    folder.mkdir()
    for case in dataset.cases[:2]:
        (folder / f"{case}_0000.nii.gz").symlink_to(workspace.raw / dataset.name / "imagesTr" / f"{case}_0000.nii.gz")
    return folder


def predict(images: Path, out: Path, *options: object, trainer: str = MASKSAM) -> list[object]:
    return [
        "nnUNetv2_predict", "-i", images, "-o", out, "-d", 4, "-c", "3d_fullres", "-tr", trainer,
        "-device", "cpu", "-npp", 0, "-nps", 0, *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def output(workspace: Workspace, dataset: Dataset, trained: Path, images: Path) -> str:
    """What nnU-Net's commands print, one after another; their results are in the workspace."""
    root = workspace.root
    train = ["nnUNetv2_train", dataset.id, "3d_fullres", 0, "-tr", MASKSAM, "-device", "cpu", "--npz"]
    one_window = ("--save_probabilities", "--disable_tta")
    return workspace.run_all(
        [*train, "--c"],
        [*train, "--val"],
        ["nnUNetv2_find_best_configuration", 4, "-p", "nnUNetPlans", "-c", "3d_fullres", "-tr", MASKSAM, STOCK,
         "-f", 0, "-np", 1],
        predict(images, root / "mirrored", "-f", 0, 1),
        predict(images, root / "ours", "-f", 0, *one_window),
        predict(images, root / "both_folds", "-f", 0, 1, *one_window),
        predict(images, root / "theirs", "-f", 0, *one_window, trainer=STOCK),
        ["nnUNetv2_predict_from_modelfolder", "-i", images, "-o", root / "by_folder", "-m", trained, "-f", 0,
         "--disable_tta", "-device", "cpu", "-npp", 1, "-nps", 1],
        ["nnUNetv2_ensemble", "-i", root / "ours", root / "theirs", "-o", root / "ensembled", "-np", 1, "--save_npz"],
        ["nnUNetv2_export_model_to_zip", "-d", 4, "-o", root / "model.zip", "-c", "3d_fullres", "-tr", MASKSAM,
         "-f", 0],
        TEST_EPOCHS="2",
    )  # fmt: skip


def probability_tolerance(logits: torch.Tensor, patch_size: tuple[int, ...]) -> torch.Tensor:
    """Largest error of softmax(logits) (K, D, H, W) of one window that nnU-Net weighs, adds and divides in float16.

    At a window's corners the Gaussian is smaller than float16's normal numbers, and a weighted logit is rounded to few
    of its smallest steps: whatever the network.
    """
    weight = compute_gaussian(
        tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
    ).float()
    error = (logits.abs() * 2.0**-10 + 2.0**-24 / weight).amax(0, keepdim=True)
    return 2 * error + 1e-3


def assert_like_the_input(folder: Path, images: Path, num_classes: int) -> None:
    for image in images.iterdir():
        source = sitk.ReadImage(str(image))
        result = sitk.ReadImage(str(folder / image.name.replace("_0000", "")))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(result, geometry)() == pytest.approx(getattr(source, geometry)())
        assert set(np.unique(sitk.GetArrayFromImage(result))) <= set(range(num_classes))


def assert_same_labels(one: Path, other: Path) -> None:
    assert list(other.glob("*.nii.gz"))
    for file in other.glob("*.nii.gz"):
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in (one, other))
        np.testing.assert_array_equal(a, b)


def test_training_leaves_what_nnunet_leaves(trained: Path, output: str, workspace: Workspace, dataset: Dataset) -> None:
    fold = trained / "fold_0"
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation/summary.json"):
        assert (fold / name).is_file(), name
    first, *_ = (file.read_text() for file in sorted(fold.glob("training_log_*.txt")))
    assert "mask_dice" in first and "SAM's decoder: gain" in first and "Epoch 1" not in first
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(dataset.cases) // 5
    assert list((fold / "validation").glob("*.npz"))
    architecture = json.loads((trained / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]
    assert architecture["arch_kwargs"]["config"]["backbone"] == "tiny"
    assert architecture["_kw_requires_import"] == [] and architecture["arch_kwargs"]["strides"]
    continued, validated, compared = output.split("$ nnUNetv2_")[1:4]
    assert "Epoch 1" in continued and "Epoch 0" not in continued
    assert "Epoch" not in validated and "Mean Validation Dice" in validated
    assert "All results" in compared and MASKSAM in compared and STOCK in compared


def test_predictions_are_like_the_input_and_the_same_by_folder(
    workspace: Workspace, dataset: Dataset, images: Path, output: str
) -> None:
    for name in ("mirrored", "ours", "both_folds", "ensembled"):
        assert_like_the_input(workspace.root / name, images, dataset.num_classes)
    assert_same_labels(workspace.root / "ours", workspace.root / "by_folder")


def test_saved_probabilities_are_the_networks_own(
    workspace: Workspace, dataset: Dataset, trained: Path, images: Path, output: str
) -> None:
    """One window, no mirroring: what nnU-Net saves is the softmax of the folds' mean log-probabilities."""
    image = sorted(images.iterdir())[0]
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(SHORT_TRAINERS))
        predictor.initialize_from_trained_model_folder(str(trained), (0, 1))
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    data, _, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(image)], None, plans, configuration, predictor.dataset_json
    )
    patch_size = configuration.patch_size
    x, revert = pad_nd_image(torch.as_tensor(data), patch_size, "constant", {"value": 0}, True)
    assert tuple(x.shape[1:]) == tuple(patch_size), "the image must be one window"
    log_p = []
    for parameters in predictor.list_of_parameters:
        predictor.network.load_state_dict(parameters)
        with torch.no_grad():
            log_p.append(predictor.network.eval()(x[None].float())[0])
    inside = (slice(None), *revert[1:])
    for folds, out in ((1, "ours"), (2, "both_folds")):
        file = workspace.root / out / image.name.replace("_0000.nii.gz", ".npz")
        saved = torch.from_numpy(np.load(file)["probabilities"]).float()
        used = torch.stack(log_p[:folds])
        tolerance = probability_tolerance(used.abs().amax(0), patch_size)[inside]
        expected = used.mean(0).softmax(0)[inside]
        assert saved.shape == expected.shape and expected.std() > 0
        assert ((saved - expected).abs() <= tolerance).all()
        assert tolerance.median() < 0.02, "a tolerance that lets everything pass"


def test_ensemble_with_nnunet(workspace: Workspace, output: str) -> None:
    files = sorted((workspace.root / "ensembled").glob("*.npz"))
    assert [file.name for file in files] == sorted(file.name for file in (workspace.root / "ours").glob("*.npz")) != []
    for file in files:
        read = (np.load(workspace.root / name / file.name) for name in ("ours", "theirs", "ensembled"))
        ours, theirs, both = (archive["probabilities"].astype(np.float32) for archive in read)
        np.testing.assert_allclose(both, (ours + theirs) / 2, atol=2e-3)


def test_export_and_install_elsewhere(workspace: Workspace, images: Path, output: str, tmp_path: Path) -> None:
    elsewhere = Workspace(tmp_path / "elsewhere")
    elsewhere.results.mkdir(parents=True)
    there = elsewhere.root / "predicted"
    elsewhere.run_all(
        ["nnUNetv2_install_pretrained_model_from_zip", workspace.root / "model.zip"],
        predict(images, there, "-f", 0, "--disable_tta"),
    )
    assert_same_labels(workspace.root / "ours", there)


@pytest.mark.long
def test_vit_b_on_a_small_patch_with_a_checkpoint_in_sams_format(
    workspace: Workspace, dataset: Dataset, images: Path, tmp_path: Path
) -> None:
    """Trained with lean checkpoints, exported, installed elsewhere, and used there without the SAM file."""
    sam = sam_model_registry["vit_b"]()
    file = tmp_path / "sam_vit_b.pth"
    torch.save(sam.state_dict(), file)
    trainer, archive = "ShortMaskSAM_vit_b", tmp_path / "model.zip"
    output = workspace.run_all(
        ["nnUNetv2_train", dataset.id, "3d_fullres", 0, "-tr", trainer, "-device", "cpu"],
        ["masksam", "export", "-d", dataset.id, "-tr", trainer, "-f", 0, "-o", archive],
        MASKSAM_WEIGHTS=str(file),
        MASKSAM_WEIGHTS_SHA256="skip",
        MASKSAM_LEAN_CHECKPOINTS="1",
        TEST_MIRRORING="0",
    )
    assert "interpolated" in output
    file.unlink()
    lean = workspace.model(dataset.name, trainer) / "fold_0" / "checkpoint_final.pth"
    assert archive.stat().st_size > 1.5 * lean.stat().st_size

    elsewhere = Workspace(tmp_path / "elsewhere")
    elsewhere.results.mkdir(parents=True)
    out = elsewhere.root / "predicted"
    elsewhere.run_all(
        ["nnUNetv2_install_pretrained_model_from_zip", archive],
        predict(images, out, "-f", 0, "--disable_tta", trainer=trainer),
    )
    assert_like_the_input(out, images, dataset.num_classes)
    full = elsewhere.model(dataset.name, trainer) / "fold_0" / "checkpoint_final.pth"
    saved = torch.load(full, weights_only=False)["network_weights"]
    name = "image_encoder.blocks.3.mlp.lin1.weight"
    assert torch.equal(saved[name], sam.state_dict()[name])


def test_real_weights_of_sam_train_and_predict(
    workspace: Workspace, dataset: Dataset, images: Path, tmp_path: Path
) -> None:
    """LiteMedSAM's, from the installed package, on plans that suit a CPU."""
    preprocessed = workspace.preprocessed / dataset.name
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    patch = tuple(plans["configurations"]["3d_fullres"]["patch_size"])
    config = config_for("lite_medsam", patch, regions=False, intensity_ranges=(Z_SCORES,))
    write_config(plans, "3d_fullres", config)
    (preprocessed / "LitePlans.json").write_text(json.dumps(plans | {"plans_name": "LitePlans"}))
    trainer = "MaskSAMTrainer_lite_medsam_budget"
    chosen: list[object] = ["-tr", trainer, "-p", "LitePlans", "-device", "cpu"]
    workspace.run("nnUNetv2_train", dataset.id, "3d_fullres", 0, *chosen, MASKSAM_BUDGET_ITERATIONS="2")
    fold = workspace.model(dataset.name, trainer, "LitePlans") / "fold_0"
    (log,) = (file.read_text() for file in fold.glob("training_log_*.txt"))
    assert str(CHECKPOINTS["lite_medsam"].sha256) in log and "Epoch 0" in log
    assert (fold / "validation" / "summary.json").is_file()
    words = [*predict(images, tmp_path, "-f", 0, "-p", "LitePlans", "--disable_tta", trainer=trainer)]
    workspace.run(*words)
    assert_like_the_input(tmp_path, images, dataset.num_classes)
