"""Model folders and input folders for the tests of the container: tiny networks on plans by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from configs import tiny_config
from kinds_of_data import OBLIQUE
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import dataset_json, plain_plans
from torch import nn

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


def write_model(
    folder: Path, folds: int = 1, channels: int = 1, reader: str = "SimpleITKIO", ending: str = ".nii.gz"
) -> Path:
    """A folder as in nnUNet_results: folds of ``tiny`` that differ, for three classes."""
    intensities = {str(channel): {"mean": 0.0, "std": 1.0} for channel in range(channels)}
    plans = plain_plans(PATCH, channels=channels) | {
        "image_reader_writer": reader,
        "foreground_intensity_properties_per_channel": intensities,
    }
    write_config(plans, "3d_fullres", tiny_config(patch_size=PATCH))
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json(channels=channels) | {"file_ending": ending}))
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
