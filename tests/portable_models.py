"""Trained models by hand, and portable ones made of them, for the tests of the portable format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from configs import tiny_config
from container_models import PATCH, add_fold, build_network
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import DATASET, SMALL_UNET, dataset_json, plain_plans
from torch import nn

from masksam_nnunet.inference.export.description import MODEL
from masksam_nnunet.plans.architecture import write_config

MASKSAM, STOCK = (f"{trainer}__nnUNetPlans__3d_fullres" for trainer in ("MaskSAMTrainer", "nnUNetTrainer"))
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


def masksam_model(results: Path, backbone: str = "tiny", folds: int = 2, sam: Path | None = None) -> Path:
    """Folds of MaskSAM as in nnUNet_results; with a file of SAM, the first one's checkpoint is lean."""
    plans = _plans(PATCH)
    write_config(plans, "3d_fullres", tiny_config(patch_size=PATCH, backbone=backbone))
    folder = _folder(results, MASKSAM, plans)
    network: Any = build_network(plans, 1)
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
