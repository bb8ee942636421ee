"""Models by hand for the tests of prediction, of the portable format and of the container, and their inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from configs import tiny_config, with_equal_shares
from kinds_of_data import OBLIQUE
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import DATASET, SMALL_UNET, dataset_json, plain_plans
from torch import nn

from masksam_nnunet.inference.export.description import MODEL
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.trainers import MaskSAMTrainer

PATCH = (3, 32, 32)
SIZE = (30, 28, 4)
"""(x, y, z) of the images: two windows."""
SPACING = (0.9, 1.1, 1.0)


def build_network(plans: dict[str, Any], channels: int) -> nn.Module:
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    return MaskSAMTrainer.build_network_architecture(manager, configuration, channels, 3)


def write_model(folder: Path, folds: int = 1, channels: int = 1, reader: str = "SimpleITKIO") -> Path:
    """A folder as in nnUNet_results: folds of ``tiny`` that differ, for three classes."""
    intensities = {str(channel): {"mean": 0.0, "std": 1.0} for channel in range(channels)}
    plans = plain_plans(PATCH, channels=channels) | {
        "image_reader_writer": reader,
        "foreground_intensity_properties_per_channel": intensities,
    }
    write_config(plans, "3d_fullres", tiny_config(patch_size=PATCH))
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json(channels=channels) | {"file_ending": ".nii.gz"}))
    with torch.random.fork_rng():
        torch.manual_seed(3)  # of those tried the one whose folds tell all classes apart
        network = build_network(plans, channels)
        for fold in range(folds):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))
            add_fold(folder, fold, network)
    return folder


def add_fold(
    folder: Path,
    fold: int | str,
    network: nn.Module,
    trainer: str = "MaskSAMTrainer",
    configuration: str = "3d_fullres",
) -> None:
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": configuration},
        "inference_allowed_mirroring_axes": (0, 2),
    }
    (folder / f"fold_{fold}").mkdir()
    torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")


def image(seed: int = 0, size: Sequence[int] = SIZE) -> sitk.Image:
    """A volume with blobs, placed obliquely."""
    rng = np.random.default_rng(seed)
    array = rng.normal(size=tuple(size)[::-1]).astype(np.float32)
    smooth = sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(array), 1.0)
    smooth.SetSpacing(SPACING)
    smooth.SetOrigin((-17.5, 3.25, 120.125))
    smooth.SetDirection(OBLIQUE)
    return sitk.Cast(smooth * 100, sitk.sitkFloat32)


def write_image(file: Path, seed: int = 0, size: Sequence[int] = SIZE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image(seed, size), str(file), True)
    return file


def write_inputs_json(folder: Path, **sockets: str) -> None:
    """As the platform writes it: slug and relative path of each image; a number that is no image."""
    entries = []
    for slug, place in [*sockets.items(), ("age", "age.json")]:
        socket = {
            "slug": slug.replace("_", "-"),
            "relative_path": place,
            "super_kind": "Value" if place.endswith(".json") else "Image",
        }
        entries.append({"socket": socket, "interface": socket, "value": None, "file": None, "image": None, "pk": 1})
    (folder / "inputs.json").write_text(json.dumps(entries))


def same_geometry(one: sitk.Image, other: sitk.Image, precision: float = 0.0) -> bool:
    """To the last bit, or within ``precision``: NIfTI keeps directions as three numbers of a quaternion in float32."""
    pairs = [
        (getattr(one, f"Get{name}")(), getattr(other, f"Get{name}")())
        for name in ("Size", "Spacing", "Origin", "Direction")
    ]
    return all(np.allclose(a, b, rtol=0, atol=precision) for a, b in pairs)


MASKSAM, STOCK = "MaskSAMTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer__nnUNetPlans__3d_fullres"
UNET = {
    "n_stages": 2, "features_per_stage": [4, 8], "kernel_sizes": [[3] * 3] * 2, "strides": [[1] * 3, [1, 2, 2]],
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
    "conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"affine": True},
    "dropout_op": None, "nonlin": "torch.nn.LeakyReLU",
}  # fmt: skip


def write_pair(results: Path, folds: int = 2, channels: int = 1) -> Path:
    """The dataset's folder in nnUNet_results with the models :data:`MASKSAM` and :data:`STOCK`."""
    folder = results / DATASET
    write_model(folder / MASKSAM, folds, channels)
    write_unet(folder / STOCK, folds, channels)
    return folder


def write_unet(
    folder: Path, folds: int = 1, channels: int = 1, more_inputs: int = 0, configuration: str = "3d_fullres"
) -> Path:
    """A stock model, sure of itself, whose labels are all frequent; ``more_inputs`` are for a cascade."""
    write_model(folder, 0, channels)
    plans = json.loads((folder / "plans.json").read_text())
    stock = plain_plans(PATCH, channels=channels)["configurations"]["3d_fullres"]["architecture"]
    plans["configurations"]["3d_fullres"]["architecture"] = stock | {"arch_kwargs": UNET}
    plans["configurations"]["3d_lowres"] = stage = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_cascade_fullres"] = {**stage, "previous_stage": "3d_lowres"}
    (folder / "plans.json").write_text(json.dumps(plans))
    manager = PlansManager(plans)
    settings = manager.get_configuration("3d_fullres")
    for fold in range(folds):
        network = nnUNetTrainer.build_network_architecture(manager, settings, channels + more_inputs, 3, False)
        last = network.decoder.seg_layers[-1]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            last.weight.mul_(20)
            last.bias.sub_(network.eval()(torch.randn(1, channels + more_inputs, *PATCH)).mean((0, 2, 3, 4)))
        add_fold(folder, fold, network, "nnUNetTrainer", configuration)
    return folder


_INTENSITIES = {"mean": 0.0, "std": 1.0, "percentile_00_5": -2.0, "percentile_99_5": 2.0}


def _plans(patch: tuple[int, ...]) -> dict[str, Any]:
    return plain_plans(patch) | {"foreground_intensity_properties_per_channel": {"0": _INTENSITIES}}


def _folder(results: Path, name: str, plans: dict[str, Any]) -> Path:
    folder = results / DATASET / name
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json()))
    return folder


def trained(network: nn.Module) -> nn.Module:
    """The network with other values of what is trained."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def masksam_model(results: Path, backbone: str = "tiny", folds: int = 2, sam: Path | None = None, **form: Any) -> Path:
    """Folds of MaskSAM as in nnUNet_results; with a file of SAM, the first one's checkpoint is lean."""
    plans = _plans(PATCH)
    write_config(plans, "3d_fullres", tiny_config(patch_size=PATCH, backbone=backbone, **form))
    folder = _folder(results, MASKSAM, plans)
    network: Any = with_equal_shares(build_network(plans, 1))
    if sam is not None:
        network.load_sam(sam)
        with network.lean_state_dicts():
            add_fold(folder, 0, trained(network))
    for fold in range(int(sam is not None), folds):
        add_fold(folder, fold, trained(network))
    return folder


def stock_model(results: Path) -> Path:
    """Two folds of a U-Net of nnU-Net's, whose modules have several names, and buffers that are trained."""
    plans = _plans((4, 16, 16))
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = SMALL_UNET
    folder = _folder(results, STOCK, plans)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, 3, False)
    for fold in range(2):
        trained(network)(torch.randn(2, 1, 4, 16, 16))  # in training mode: statistics move
        add_fold(folder, fold, network, "nnUNetTrainer")
    return folder


def sign(folder: Path) -> None:
    """Let the description say what the files are now, as someone would who means harm."""
    description = json.loads((folder / MODEL).read_text())
    for name in description["files"]:
        content = (folder / name).read_bytes()
        description["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / MODEL).write_text(json.dumps(description))
