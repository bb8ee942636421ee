"""Plain nnU-Net plans by hand, for trainers that never see a file of data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from configs import tiny_config

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import TrainingCost
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.trainers import MaskSAMTrainer

DATASET = "Dataset042_Hand"
SMALL_UNET: dict[str, Any] = {
    "n_stages": 2, "features_per_stage": [4, 8], "kernel_sizes": [[3] * 3] * 2, "strides": [[1] * 3, [2] * 3],
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
    "conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {}, "dropout_op": None,
    "nonlin": "torch.nn.ReLU",
}  # fmt: skip
"""Arguments of a U-Net of nnU-Net's whose modules have several names, with buffers that are trained."""


def plain_plans(
    patch: tuple[int, ...] = (4, 32, 32), channels: int = 1, batch_size: int = 2, **more: Any
) -> dict[str, Any]:
    """Plans with one configuration, ``3d_fullres``, which hold a U-Net, as nnU-Net's own do."""
    dims = len(patch)
    configuration = {
        "data_identifier": "hand_data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"n_stages": 2, "strides": [[1] * dims, [2] * dims]},
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
        **more,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": list(patch),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
    }


def tiny_plans(
    patch: tuple[int, ...] = (4, 32, 32), form: Mapping[str, Any] = MappingProxyType({}), **more: Any
) -> dict[str, Any]:
    """Plain plans that name a tiny network, so that none has to be derived, which takes seconds.

    ``form`` are options of its config, such as ``PAPER``.
    """
    plans = plain_plans(patch, **more)
    write_config(plans, "3d_fullres", tiny_config(patch_size=patch, **form))
    return plans


def dataset_json(num_classes: int = 3, channels: int = 1, ignore: bool = False) -> dict[str, Any]:
    """Labels 0..K-1, and an ignore label K if asked for."""
    labels: dict[str, Any] = {"background": 0, **{f"organ {i}": i for i in range(1, num_classes)}}
    if ignore:
        labels["ignore"] = num_classes
    return {"labels": labels, "channel_names": {str(i): "MRI" for i in range(channels)}, "file_ending": ".nii.gz"}


def region_dataset_json(ignore: bool = False) -> dict[str, Any]:
    """Two nested regions of three labels."""
    description = dataset_json(4)
    description["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3]}
    if ignore:
        description["labels"]["ignore"] = 4
    description["regions_class_order"] = [1, 2]
    return description


def folders(root: Path, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders, with what its dataset class looks for."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        patch.setenv(name, str(root / name))
    data = root / "nnUNet_preprocessed" / DATASET / "hand_data"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()


def batch(made: MaskSAMTrainer, empty: bool = False) -> dict[str, torch.Tensor]:
    """What nnU-Net's loader gives."""
    size = (made.batch_size, 1, *made.configuration_manager.patch_size)
    manager = made.label_manager
    highest = max(manager.all_labels) if not manager.has_regions else 3
    labels = torch.zeros(size, dtype=torch.int16) if empty else torch.randint(0, highest + 1, size, dtype=torch.int16)
    if manager.has_regions:
        maps = [torch.isin(labels, torch.tensor(list(region))) for region in manager.foreground_regions]
        if manager.has_ignore_label:
            maps.append(torch.rand(size) < 0.2)
        labels = torch.cat(maps, dim=1)
    elif manager.has_ignore_label:
        labels[torch.rand(size) < 0.2] = manager.ignore_label
    return {"data": torch.randn(made.batch_size, made.num_input_channels, *size[2:]), "target": labels}


def simple_cost(
    config: MaskSAMConfig,
    channels: int,
    classes: int,
    batch: int,
    precision: str = "bfloat16",
    ignores: bool = False,
) -> TrainingCost:
    """Linear in the pixels that SAM sees: a GiB for 2^20 of them, a fifth with checkpointing, and the weights.

    A stand-in for :func:`training_cost`, which takes seconds a time.
    """
    weights = {"tiny": 0.1, "lite_medsam": 0.9, "mobile_sam": 0.9, "medsam_vit_b": 1.0}
    weights |= {"vit_b": 1.0, "vit_l": 2.0, "vit_h": 4.0}
    pixels = batch * math.prod(config.patch_size) * config.resolution**2
    memory = weights[config.backbone] + pixels / 2**20 * (0.2 if config.checkpointing else 1)
    work = weights[config.backbone] * pixels / 2**20 * (1.3 if config.checkpointing else 1)
    return TrainingCost(int(memory * 2**30), int(work * 1e12))
