"""The MaskSAM config in nnU-Net's plans: read and written in ``architecture``, or derived from plain plans.

A derived config depends on plans, dataset.json and backbone only, never on the machine: every fold, and prediction
anywhere, must use the same network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.config import Z_SCORES, ConfigError, LightConfig, MaskSAMConfig, UNetConfig
from masksam_nnunet.cost import training_cost
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import in_short
from masksam_nnunet.method import find_method

BASE_PLANS = "nnUNetPlans"
"""nnU-Net's own plans, whose preprocessed data MaskSAM's plans share."""
NETWORK_CLASS = "masksam_nnunet.modeling.MaskSAM"
DECISIONS = "masksam"
"""The key of plans under which ``masksam plan`` keeps its decisions; nnU-Net ignores it."""
EPOCHS = "epochs"
"""The key of a configuration's decisions for the number of epochs, which the trainer follows."""
_CONFIG_KEY = "config"
_READ = ("patch_size", "batch_size", "spacing", "normalization_schemes", "data_identifier", "architecture")

MIN_EDGE = 4
"""Voxels along the edge of a U-Net's coarsest map, at least: nnU-Net's number."""
RESIDUAL_BLOCKS = (1, 3, 4, *(6,) * 10)
"""Of nnU-Net's residual encoder, by stage."""

USABLE = 7 / 8  # of a card's memory: the rest is for the driver and fragmentation
MEMORY_GIB = 24 * USABLE  # a common research card
MASKED_Z_SCORES = (-2.5, 2.5)  # what lies outside the mask is 0, the mean of what lies inside


@dataclass(frozen=True)
class Profile:
    """Widths and limits that go with a backbone."""

    stem_width: int
    generator_widths: tuple[int, int, int]
    head_width: int
    max_tflop: float
    """Most operations of a training step on plain plans, in 10^12; limits r."""
    resolutions: tuple[float, ...] = (4, 2, 1)
    """Values of r to try; the last is always allowed."""


# The paper's ACDC setting takes 37. 40 are two days of 1000 epochs on a card with 60 TFLOP/s.
SAM_PROFILE = Profile(32, (256, 128, 64), 32, max_tflop=40.0)
# A second or two a step on two CPU cores.
TINY_PROFILE = Profile(16, (64, 32, 16), 16, max_tflop=0.15, resolutions=(2, 1))
# A SAM of fine stride makes masks as large as its input: there channels are dear.
FINE_PROFILE = Profile(16, (64, 48, 32), 16, max_tflop=20.0, resolutions=(4, 2, 1, 0.5, 0.25))


def profile_of(backbone: str) -> Profile:
    """The profile of the tiny encoder, or of SAM with tokens of few or of many pixels."""
    if backbone == "tiny":
        return TINY_PROFILE
    return FINE_PROFILE if BACKBONES[backbone].stride < 16 else SAM_PROFILE


def config_for(
    backbone: str, patch_size: tuple[int, ...], regions: bool, unet: UNetConfig | None = None, **more: Any
) -> MaskSAMConfig:
    """A config with the backbone's widths, the light generator or ``unet``, at r = 1 unless ``more`` says otherwise.

    Beside a U-Net, which connects the slices and sees the image, the encoder has no adapters.
    """
    profile = profile_of(backbone)
    settings: dict[str, Any] = {
        "resolution": 1,
        "generator": unet or LightConfig(widths=profile.generator_widths),
        "encoder_adapters": unet is None,
        "stem_width": profile.stem_width,
        "head_width": profile.head_width,
    }
    return MaskSAMConfig(backbone=backbone, patch_size=patch_size, regions=regions, **settings | more)


def unet_config(spacing: Sequence[float], patch_size: Sequence[int], residual: bool = False) -> UNetConfig:
    """The U-Net that nnU-Net's planner makes for a patch; one stage less wherever it would change the patch.

    A 2D patch is one slice. Numbers as in nnU-Net's ``ExperimentPlanner`` and ``ResEncUNetPlanner``.
    """
    flat = len(patch_size) == 2
    patch = np.array(patch_size)
    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch_size, MIN_EDGE, 999999)
    total, kept = np.ones_like(patch), []
    for stride in strides:
        allowed = np.where(patch % (total * stride) == 0, stride, 1)
        total *= allowed
        kept.append(allowed.tolist())
    stages = [i for i, stride in enumerate(kept) if not i or max(stride) > 1]
    while len(stages) < 2:  # nnU-Net's networks have two at least
        stages.append(stages[-1])
    blocks = RESIDUAL_BLOCKS[: len(stages)] if residual else (2,) * len(stages)
    one = (1,) if flat else ()
    return UNetConfig(
        features=tuple(min(32 * 2**i, 512 if flat else 320) for i in range(len(stages))),
        kernel_sizes=tuple((*one, *kernels[i]) for i in stages),
        strides=tuple((*one, *kept[i]) for i in stages),
        blocks=blocks,
        residual=residual,
    )


def config_of_method(config: MaskSAMConfig, name: str, spacing: Sequence[float], residual: bool) -> MaskSAMConfig:
    """A config of MaskSAM as one of another method: the same patch, r, backbone and intensities.

    ``spacing`` of the patch's axes, for the U-Net that nnU-Net would plan for it; ``residual``: with a ResEnc encoder.
    """
    method = find_method(name)
    changes: dict[str, Any] = {"method": name, "encoder_adapters": method.adapts_encoder, "matching": "class"}
    if method.unet and not isinstance(config.generator, UNetConfig):
        changes["generator"] = unet_config(spacing, config.patch_size, residual)
    return replace(config, num_queries=1, **changes)


def round_up(number: float, step: int) -> int:
    """The next multiple of ``step``."""
    return math.ceil(number / step) * step


def config_of_plans(
    plans: dict[str, Any], configuration_name: str, dataset_json: dict[str, Any], backbone: str
) -> MaskSAMConfig:
    """A config of ``backbone`` at r = 1 with the patch, classes and intensities of a configuration of plain plans."""
    manager = PlansManager(plans)
    configuration, labels = manager.get_configuration(configuration_name), manager.get_label_manager(dataset_json)
    patch = tuple(int(size) for size in configuration.patch_size)
    return config_for(
        backbone,
        patch,
        labels.has_regions,
        intensity_ranges=intensity_ranges(plans, configuration.normalization_schemes, configuration.use_mask_for_norm),
    )


def derive_config(
    plans: dict[str, Any], configuration_name: str, dataset_json: dict[str, Any], backbone: str
) -> MaskSAMConfig:
    """The config of ``backbone`` for a configuration of plain plans.

    r is the largest of the profile's at which the encoder sees no more than the size it was trained on and whose step
    fits the memory and operation targets, with activation checkpointing before r is lowered; else the smallest.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    labels = manager.get_label_manager(dataset_json)
    classes = labels.num_segmentation_heads
    config = config_of_plans(plans, configuration_name, dataset_json, backbone)
    profile = profile_of(backbone)
    for resolution in profile.resolutions:
        if resolution * max(config.patch_size[-2:]) > config.encoder.image_size:
            continue
        for checkpointing in (False, True):
            candidate = replace(config, resolution=resolution, checkpointing=checkpointing)
            cost = training_cost(
                candidate, channels, classes, configuration.batch_size, ignores=labels.has_ignore_label
            )
            if cost.tflop > profile.max_tflop:
                break  # recomputing takes more
            if cost.peak_gib <= MEMORY_GIB:
                return candidate
    return replace(config, resolution=profile.resolutions[-1], checkpointing=True)


def intensity_ranges(
    plans: dict[str, Any], schemes: Sequence[str], use_mask_for_norm: Sequence[bool]
) -> tuple[tuple[float, float], ...]:
    """Black and white of each image channel after nnU-Net's normalisation, as far as plans tell.

    CT is clipped to its range; what is not normalised has the percentiles of the foreground; [0, 1] is what it says.
    All else is z-scored image by image: those have no common range, so it is a typical one.
    """
    properties = plans.get("foreground_intensity_properties_per_channel", {})

    def of_channel(channel: int, scheme: str, masked: bool) -> tuple[float, float]:
        found = properties.get(str(channel), {})
        low, high = (float(found.get(f"percentile_{share}", math.nan)) for share in ("00_5", "99_5"))
        if scheme == "CTNormalization":
            low, high = (
                (value - found.get("mean", math.nan)) / max(found.get("std", 0), 1e-8) for value in (low, high)
            )
        if scheme in ("CTNormalization", "NoNormalization") and low < high:  # NaN where no case has foreground
            return low, high
        if scheme in ("RescaleTo01Normalization", "RGBTo01Normalization"):
            return 0.0, 1.0
        return MASKED_Z_SCORES if masked else Z_SCORES

    channels = zip(schemes, use_mask_for_norm, strict=True)
    return tuple(of_channel(channel, *settings) for channel, settings in enumerate(channels))


def read_config(configuration: ConfigurationManager) -> MaskSAMConfig | None:
    """The MaskSAM config of a configuration; None where plans hold another network.

    Raises:
        ConfigError: the config is broken.
    """
    if configuration.network_arch_class_name != NETWORK_CLASS:
        return None
    kwargs = configuration.configuration["architecture"].get("arch_kwargs")
    if not isinstance(kwargs, dict) or _CONFIG_KEY not in kwargs:
        raise ConfigError(f"plans name {NETWORK_CLASS} but hold no {_CONFIG_KEY!r} in arch_kwargs. Plan again.")
    content = kwargs[_CONFIG_KEY]
    # A list, as what JSON holds need not be hashable.
    if isinstance(content, dict) and content.get("backbone") not in list(BACKBONES):
        _import_trainers()
    return MaskSAMConfig.from_json(content)


def _import_trainers() -> None:
    """Import all modules of the folders that nnU-Net searches for trainers: they may register the backbone."""
    for folder in filter(os.path.isdir, os.environ.get(EXT_TRAINER, "").split(os.pathsep)):
        try:  # no class has an empty name, so nnU-Net's search visits all modules
            recursive_find_python_class(folder, "", None, base_folder=folder, cleanup_imports_from_base_folder=True)
        except Exception as error:
            raise ConfigError(f"{EXT_TRAINER}: a module in {folder} cannot be imported ({in_short(error)})") from error


def open_configuration(plans: Any, name: str) -> tuple[ConfigurationManager, MaskSAMConfig | None]:
    """A configuration of plans from a file, as nnU-Net resolves it, and its MaskSAM config; None for another network.

    Raises:
        ConfigError: the plans are damaged, lack the configuration or what nnU-Net reads of it, or are of another
            version.
    """
    try:
        configuration = PlansManager(plans).get_configuration(name)
        missing = [key for key in _READ if key not in configuration.configuration]
        if missing or not isinstance(configuration.configuration["architecture"]["network_class_name"], str):
            raise LookupError(f"{', '.join(missing) or 'network_class_name'} is missing")
    except Exception as error:  # nnU-Net fails in many ways on damaged plans
        raise ConfigError(
            f"configuration {name!r} of these plans cannot be used ({in_short(error)}): it is missing, damaged or of "
            "another version of nnU-Net. Plan again."
        ) from error
    return configuration, read_config(configuration)


def write_config(plans: dict[str, Any], configuration_name: str, config: MaskSAMConfig) -> None:
    """Put a config into plans, in place, beside what nnU-Net needs there."""
    # A manager of its own for the configuration without its parent: nnU-Net caches and copies configurations.
    resolved = PlansManager(plans)._internal_resolve_configuration_inheritance(configuration_name)
    before = ConfigurationManager(resolved)
    plans["configurations"][configuration_name]["architecture"] = {
        "network_class_name": NETWORK_CLASS,
        "arch_kwargs": {_CONFIG_KEY: config.to_json(), "strides": before.pool_op_kernel_sizes},
        "_kw_requires_import": [],
    }
