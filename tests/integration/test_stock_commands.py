"""nnU-Net's own commands with MaskSAM trainers, on plain nnUNetPlans, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from float16 import probability_tolerance
from nnunet_workspace import SHORT_TRAINERS, Dataset, Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from segment_anything import sam_model_registry

pytestmark = pytest.mark.integration
MASKSAM, STOCK = "ShortMaskSAM", "ShortNNUNet"


@pytest.fixture(scope="module")
def trained(workspace: Workspace, dataset: Dataset) -> Path:
    """Folds 0 and 1 of MaskSAM and of stock nnU-Net, validated with probabilities."""
    workspace.run_all(
        *(
            ["nnUNetv2_train", dataset.id, "3d_fullres", fold, "-tr", trainer, "-device", "cpu", "--npz"]
            for trainer in (MASKSAM, STOCK)
            for fold in (0, 1)
        )
    )
    return workspace.model(dataset.name, MASKSAM)


@pytest.fixture(scope="module")
def images(workspace: Workspace, dataset: Dataset) -> Path:
    """Two images to predict."""
    folder = workspace.root / "to_predict"
    folder.mkdir()
    for case in dataset.cases[:2]:
        (folder / f"{case}_0000.nii.gz").symlink_to(workspace.raw / dataset.name / "imagesTr" / f"{case}_0000.nii.gz")
    return folder


def predict(workspace: Workspace, images: Path, out: str, *options: object, trainer: str = MASKSAM) -> Path:
    target = workspace.root / out
    workspace.run(
        "nnUNetv2_predict", "-i", images, "-o", target, "-d", 4, "-c", "3d_fullres", "-tr", trainer,
        "-device", "cpu", "-npp", 1, "-nps", 1, *options,
    )  # fmt: skip
    return target


def assert_like_the_input(folder: Path, images: Path, num_classes: int) -> None:
    for image in images.iterdir():
        source = sitk.ReadImage(str(image))
        result = sitk.ReadImage(str(folder / image.name.replace("_0000", "")))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(result, geometry)() == pytest.approx(getattr(source, geometry)())
        assert set(np.unique(sitk.GetArrayFromImage(result))) <= set(range(num_classes))


def assert_same_labels(one: Path, other: Path) -> None:
    for file in one.glob("*.nii.gz"):
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in (one, other))
        np.testing.assert_array_equal(a, b)


def test_training_leaves_what_nnunet_leaves(trained: Path, dataset: Dataset) -> None:
    fold = trained / "fold_0"
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation/summary.json"):
        assert (fold / name).is_file(), name
    assert not list(fold.glob("*.part"))
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert "mask_dice" in log
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(dataset.cases) // 5
    assert list((fold / "validation").glob("*.npz"))
    architecture = json.loads((trained / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]
    assert architecture["arch_kwargs"]["config"]["backbone"] == "tiny"
    assert architecture["_kw_requires_import"] == [] and architecture["arch_kwargs"]["strides"]


def test_continue_and_validate(workspace: Workspace, dataset: Dataset, trained: Path) -> None:
    before = {p.name for p in (trained / "fold_0").glob("training_log_*")}
    workspace.train(dataset.id, 0, MASKSAM, "--c", "--npz", TEST_EPOCHS="2")
    log = next(p for p in (trained / "fold_0").glob("training_log_*") if p.name not in before).read_text()
    assert "Epoch 1" in log and "Epoch 0" not in log
    summary = trained / "fold_0" / "validation" / "summary.json"
    summary.unlink()
    workspace.train(dataset.id, 0, MASKSAM, "--val", "--npz")
    assert summary.is_file()


def test_predict_with_folds_mirrors_and_by_model_folder(
    workspace: Workspace, dataset: Dataset, trained: Path, images: Path
) -> None:
    one = predict(workspace, images, "one_fold", "-f", 0, "--disable_tta")
    assert_like_the_input(one, images, dataset.num_classes)
    two = predict(workspace, images, "two_folds", "-f", 0, 1, "--save_probabilities")
    assert_like_the_input(two, images, dataset.num_classes)
    by_folder = workspace.root / "by_folder"
    workspace.run(
        "nnUNetv2_predict_from_modelfolder", "-i", images, "-o", by_folder, "-m", trained, "-f", 0, "--disable_tta",
        "-device", "cpu", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    assert_same_labels(one, by_folder)


def test_saved_probabilities_are_the_networks_own(
    workspace: Workspace, dataset: Dataset, trained: Path, images: Path
) -> None:
    """One window, no mirroring: what nnU-Net saves is the softmax of the folds' mean log-probabilities."""
    crop = workspace.root / "one_window"
    crop.mkdir()
    source = sitk.ReadImage(str(sorted(images.iterdir())[0]))
    sitk.WriteImage(source, str(crop / "crop_0000.nii.gz"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(SHORT_TRAINERS))
        predictor.initialize_from_trained_model_folder(str(trained), (0, 1))
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    data, _, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(crop / "crop_0000.nii.gz")], None, plans, configuration, predictor.dataset_json
    )
    patch_size = configuration.patch_size
    x, revert = pad_nd_image(torch.as_tensor(data), patch_size, "constant", {"value": 0}, True)
    assert tuple(x.shape[1:]) == tuple(patch_size), "the crop must be one window"
    log_p = []
    for parameters in predictor.list_of_parameters:
        predictor.network.load_state_dict(parameters)
        with torch.no_grad():
            log_p.append(predictor.network.eval()(x[None].float())[0])
    inside = (slice(None), *revert[1:])
    for folds in ((0,), (0, 1)):
        out = predict(
            workspace, crop, f"probabilities_{len(folds)}", "-f", *folds, "--save_probabilities", "--disable_tta"
        )
        saved = torch.from_numpy(np.load(out / "crop.npz")["probabilities"]).float()
        used = torch.stack(log_p[: len(folds)])
        tolerance = probability_tolerance(used.abs().amax(0), patch_size)[inside]
        expected = used.mean(0).softmax(0)[inside]
        assert saved.shape == expected.shape and expected.std() > 0
        assert ((saved - expected).abs() <= tolerance).all()
        assert tolerance.median() < 0.02, "a tolerance that lets everything pass"


def test_ensemble_with_nnunet(workspace: Workspace, dataset: Dataset, trained: Path, images: Path) -> None:
    ours = predict(workspace, images, "ours", "-f", 0, "--save_probabilities", "--disable_tta")
    theirs = predict(workspace, images, "theirs", "-f", 0, "--save_probabilities", "--disable_tta", trainer=STOCK)
    out = workspace.root / "ensembled"
    workspace.run("nnUNetv2_ensemble", "-i", ours, theirs, "-o", out, "-np", 1, "--save_npz")
    assert_like_the_input(out, images, dataset.num_classes)
    for file in out.glob("*.npz"):
        both = [np.load(folder / file.name)["probabilities"].astype(np.float32) for folder in (ours, theirs)]
        result = np.load(file)["probabilities"].astype(np.float32)
        np.testing.assert_allclose(result, (both[0] + both[1]) / 2, atol=2e-3)


def test_find_best_configuration(workspace: Workspace, trained: Path) -> None:
    output = workspace.run(
        "nnUNetv2_find_best_configuration", 4, "-p", "nnUNetPlans", "-c", "3d_fullres", "-tr", MASKSAM, STOCK,
        "-f", 0, 1, "-np", 1,
    )  # fmt: skip
    assert "All results" in output and MASKSAM in output
    assert (workspace.results / "Dataset004_Small" / "inference_instructions.txt").is_file()


def test_export_and_install_elsewhere(
    workspace: Workspace, dataset: Dataset, trained: Path, images: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "model.zip"
    workspace.run("nnUNetv2_export_model_to_zip", "-d", 4, "-o", archive, "-c", "3d_fullres", "-tr", MASKSAM, "-f", 0)
    elsewhere = Workspace(tmp_path / "elsewhere")
    elsewhere.results.mkdir(parents=True)
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    here = predict(workspace, images, "before_export", "-f", 0, "--disable_tta")
    there = predict(elsewhere, images, "after_install", "-f", 0, "--disable_tta")
    assert_like_the_input(there, images, dataset.num_classes)
    assert_same_labels(here, there)


def test_pretrained_weights_of_another_config_are_refused(
    workspace: Workspace, trained: Path, binary_dataset: Dataset
) -> None:
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    with workspace.plans(binary_dataset.name, patch_size=[16, 48, 48]):
        output = workspace.train(binary_dataset.id, 1, MASKSAM, "-pretrained_weights", checkpoint, fails=True)
    assert "AssertionError" in output and "Epoch 0" not in output  # nnU-Net compares the shapes itself


def test_pretrained_weights_with_another_number_of_classes(
    workspace: Workspace, dataset: Dataset, trained: Path, binary_dataset: Dataset
) -> None:
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    output = workspace.train(binary_dataset.id, 0, MASKSAM, "-pretrained_weights", checkpoint)
    assert "Loading pretrained weights" in output
    weights = torch.load(checkpoint, weights_only=False)["network_weights"]
    assert len(weights["mask_decoder.classifier.seg_layers.0.weight"]) == dataset.num_classes + 1
    fold = workspace.model(binary_dataset.name, MASKSAM) / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()


def test_a_fold_of_another_config_is_refused(workspace: Workspace, dataset: Dataset, trained: Path) -> None:
    before = (trained / "plans.json").read_bytes()
    with workspace.plans(dataset.name, patch_size=[16, 48, 48]):
        output = workspace.train(dataset.id, 2, MASKSAM, fails=True)
    assert "[16, 48, 48]" in output
    assert (trained / "plans.json").read_bytes() == before and not (trained / "fold_2").exists()


def test_vit_b_needs_sam_and_says_how_to_get_it(workspace: Workspace, dataset: Dataset, tmp_path: Path) -> None:
    output = workspace.train(dataset.id, 0, "ShortMaskSAM_vit_b", fails=True, MASKSAM_CACHE=str(tmp_path))
    assert "masksam weights vit_b" in output and "Epoch 0" not in output


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
        [
            "nnUNetv2_predict", "-i", images, "-o", out, "-d", dataset.id, "-c", "3d_fullres", "-tr", trainer,
            "-f", 0, "--disable_tta", "-device", "cpu", "-npp", 1, "-nps", 1,
        ],
    )  # fmt: skip
    assert_like_the_input(out, images, dataset.num_classes)
    full = elsewhere.model(dataset.name, trainer) / "fold_0" / "checkpoint_final.pth"
    saved = torch.load(full, weights_only=False)["network_weights"]
    name = "image_encoder.blocks.3.mlp.lin1.weight"
    assert torch.equal(saved[name], sam.state_dict()[name])
