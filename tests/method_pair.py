"""Results of two methods on one dataset, MaskSAM and stock nnU-Net: tiny networks, folds that differ."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from container_models import PATCH, add_fold, write_model
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import DATASET, plain_plans

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
