"""What ``make bench`` compares with nnU-Net itself: a training step, a sliding-window case, an export."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import training
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from measure import Builder, Case, Step
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from segment_anything import sam_model_registry
from torch import nn

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.inference.predictor import MaskSAMPredictor
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans.architecture import BASE_PLANS, write_config

PATCH, VOLUME, CLASSES, SPACING = (8, 128, 128), (8, 192, 192), 4, (5.0, 1.0, 1.0)
FOLDS_PATCH = (4, 64, 64)


def unet(residual: bool, patch: tuple[int, ...] = PATCH, spacing: tuple[float, ...] = SPACING) -> nn.Module:
    """nnU-Net's own network for the patch: PlainConvUNet, or ResEnc-L's ResidualEncoderUNet."""
    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    stages = len(strides)
    blocks = (1, 3, 4, 6, 6, 6, 6)[:stages] if residual else [2] * stages
    return (ResidualEncoderUNet if residual else PlainConvUNet)(
        1,
        stages,
        [min(32 * 2**stage, 320) for stage in range(stages)],
        nn.Conv3d,
        kernels,
        strides,
        blocks,
        CLASSES,
        [1 if residual else 2] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def nnunet_loss() -> nn.Module:
    """nnU-Net's own, as its trainer makes it."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)


def unet_step(
    residual: bool,
    patch: tuple[int, ...] = PATCH,
    spacing: tuple[float, ...] = SPACING,
    with_optimizer: bool = False,
    compiled: bool = False,
) -> Builder:
    def build(device: torch.device) -> Step:
        network = unet(residual, patch, spacing).to(device).train()
        x = torch.randn(2, 1, *patch, device=device)
        truth = torch.randint(CLASSES, (2, 1, *patch), device=device)
        with torch.no_grad():
            sizes = [output.shape[2:] for output in network(x)]
        truths = [nn.functional.interpolate(truth.float(), size) for size in sizes]
        weights = [2.0**-level for level in range(len(sizes) - 1)] + [0.0]
        loss = DeepSupervisionWrapper(nnunet_loss(), [weight / sum(weights) for weight in weights])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        on_gpu = device.type == "cuda"  # where nnU-Net trains in float16
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=on_gpu)  # so that no step is skipped
        forward = torch.compile(network) if compiled else network

        def step() -> None:
            network.zero_grad(set_to_none=True)
            with torch.autocast(device.type, enabled=on_gpu):
                outputs = forward(x)
            scaler.scale(loss([output.float() for output in outputs], truths)).backward()
            if with_optimizer:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), 12)
                scaler.step(optimizer)
                scaler.update()

        return step

    return build


def _masksam_step(backbone: str, resolution: int) -> Builder:
    config = MaskSAMConfig(backbone, PATCH, resolution, 6, "slice")
    return training(config, torch.randint(CLASSES, (2, 1, *PATCH)), CLASSES, nnunet_loss())


def _plans(config: MaskSAMConfig | None, patch: tuple[int, ...]) -> dict[str, Any]:
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "spacing": [5.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": [[1, 1, 1], [1, 2, 2]]},
            "_kw_requires_import": [],
        },
    }
    plans = {
        "dataset_name": "Dataset999_Bench",
        "plans_name": BASE_PLANS,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
    }
    if config is not None:
        write_config(plans, "3d_fullres", config)
    return plans


def _dataset() -> dict[str, Any]:
    labels = {"background": 0} | {f"class{i}": i for i in range(1, CLASSES)}
    return {"labels": labels, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}


def _predictor(ours: bool, device: torch.device, mirroring: bool = True) -> nnUNetPredictor:
    return (MaskSAMPredictor if ours else nnUNetPredictor)(
        device=device,
        perform_everything_on_device=device.type == "cuda",
        use_mirroring=mirroring,
        allow_tqdm=False,
    )


def prediction(network_of: Any, ours: bool, size: tuple[int, ...] = VOLUME, patch: tuple[int, ...] = PATCH) -> Builder:
    """A volume of this size, by a network that ``network_of`` makes."""

    def build(device: torch.device) -> Step:
        network, config = network_of()
        manager = PlansManager(_plans(config, patch))
        configuration = manager.get_configuration("3d_fullres")
        predictor = _predictor(ours, device)
        predictor.manual_initialization(
            network, manager, configuration, [network.state_dict()], _dataset(), "bench", (0, 1, 2)
        )
        volume = torch.randn(1, *size)
        return lambda: predictor.predict_logits_from_preprocessed_data(volume)

    return build


def _folds(ours: bool, number: int) -> Builder:
    """Folds of a ViT-B with the same frozen SAM, read from their checkpoints; one window."""

    def build(device: torch.device) -> Step:
        folder = tempfile.TemporaryDirectory()
        # In another process: what writing takes is no part of what is measured.
        writer = get_context("spawn").Process(target=_write_model, args=(Path(folder.name), number, False))
        writer.start()
        writer.join()
        _set_folders(Path(folder.name))
        predictor = _predictor(ours, device, mirroring=False)
        model = _model_folder(Path(folder.name))
        predictor.initialize_from_trained_model_folder(str(model), tuple(range(number)), "checkpoint_final.pth")
        volume = torch.randn(1, *FOLDS_PATCH)
        return lambda: (predictor.predict_logits_from_preprocessed_data(volume), folder)

    return build


def tiny() -> tuple[nn.Module, MaskSAMConfig]:
    config = MaskSAMConfig("tiny", PATCH, 1, 6, "slice")
    return MaskSAM(config, 1, CLASSES).eval(), config


def stock(patch: tuple[int, ...] = PATCH, spacing: tuple[float, ...] = SPACING) -> tuple[nn.Module, None]:
    network = unet(residual=False, patch=patch, spacing=spacing)
    network.decoder.deep_supervision = False
    return network.eval(), None


def _set_folders(root: Path) -> None:
    os.environ["nnUNet_results"] = os.environ["nnUNet_raw"] = os.environ["nnUNet_preprocessed"] = str(root)
    os.environ |= {"MASKSAM_WEIGHTS": str(root / "sam_vit_b.pth"), "MASKSAM_WEIGHTS_SHA256": "skip"}
    os.environ[EXT_TRAINER] = ext_trainer_value(None)


def _model_folder(root: Path) -> Path:
    return root / "Dataset999_Bench" / f"MaskSAMTrainer__{BASE_PLANS}__3d_fullres"


def _write_model(root: Path, folds: int, lean: bool) -> None:
    """A trained model of ViT-B in ``root``, folds of different trained weights, and the SAM file it came from."""
    _set_folders(root)
    torch.save(sam_model_registry["vit_b"]().state_dict(), root / "sam_vit_b.pth")
    config = MaskSAMConfig("vit_b", FOLDS_PATCH, 4, 8, "slice")
    network = MaskSAM(config, 1, CLASSES)
    network.load_sam(root / "sam_vit_b.pth")
    model = _model_folder(root)
    for fold in (model / f"fold_{number}" for number in range(folds)):
        (fold / "validation").mkdir(parents=True)
        (fold / "progress.png").touch()
        (fold / "validation" / "summary.json").write_text("{}")
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-3 * torch.randn_like(parameter)
        with network.lean_state_dicts() if lean else contextlib.nullcontext():
            state = network.state_dict()
        checkpoint = {
            "network_weights": state,
            "trainer_name": "MaskSAMTrainer",
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, fold / "checkpoint_final.pth")
    for name, content in (("plans", _plans(config, FOLDS_PATCH)), ("dataset", _dataset()), ("dataset_fingerprint", {})):
        (model / f"{name}.json").write_text(json.dumps(content))


def _export(lean: bool) -> Builder:
    """One fold of ViT-B: lean by ``masksam export``, full by nnU-Net's own export."""

    def build(device: torch.device) -> Step:
        folder = tempfile.TemporaryDirectory()
        _write_model(Path(folder.name), 1, lean)
        output = Path(folder.name) / "model.zip"

        def step() -> object:
            if lean:
                from masksam_nnunet.inference.export.write import export_model

                return export_model("Dataset999_Bench", output, "MaskSAMTrainer", BASE_PLANS, folds=("0",)), folder
            from nnunetv2.model_sharing.model_export import export_pretrained_model

            export_pretrained_model(
                "Dataset999_Bench", str(output), ("3d_fullres",), "MaskSAMTrainer", BASE_PLANS, folds=(0,)
            )
            return folder

        return step

    return build


def cases() -> list[Case]:
    patch, volume = ("x".join(map(str, size)) for size in (PATCH, VOLUME))
    step, window = f"patch {patch}, batch 2; network and loss", f"volume {volume}, patch {patch}, eight mirrors"
    one = f"ViT-B, r = 4, one window of {'x'.join(map(str, FOLDS_PATCH))}"
    tiny_step, ours = _masksam_step("tiny", 1), prediction(tiny, True)
    unets = {"tiny": tiny_step, "vit_b, r = 1": _masksam_step("vit_b", 1), "nnU-Net": unet_step(False)}
    same = {"ours": ours, "nnUNetv2_predict, same network": prediction(tiny, False)}
    beside = {"tiny, masksam predict": ours, "nnU-Net, nnUNetv2_predict": prediction(stock, False)}
    folds = {"ours": _folds(True, 5), "ours, one fold": _folds(True, 1), "nnUNetv2_predict": _folds(False, 5)}
    exports = {"masksam export, lean": _export(True), "nnU-Net's export, full": _export(False)}
    return [
        Case("training step beside nnU-Net", step, unets, 3),
        Case("training step beside ResEnc-L", step, {"tiny": tiny_step, "ResEnc-L": unet_step(True)}, 3),
        Case("sliding-window case, masksam predict", f"tiny, {window}", same, 3),
        Case("sliding-window case beside nnU-Net", window, beside, 3),
        Case("five folds, masksam predict", one, folds, 1, warm_up=False),
        Case("export", "ViT-B, one fold", exports, 2, warm_up=False),
    ]
