"""Derive a MaskSAM config for plans that hold none.

A function of plans, dataset.json and backbone only, never of the machine at hand: every fold, and prediction anywhere,
must come to the same network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import TrainingCost, training_cost

MAX_IMAGE = 1024  # SAM's own input size
CARD_GB = 24.0  # a common research card
USABLE = 7 / 8  # of a card's memory: the rest is for the driver, fragmentation and what cannot be predicted
MEMORY_GIB = CARD_GB * USABLE
MAX_QUERIES = 64


@dataclass(frozen=True)
class Profile:
    """What goes with a backbone on plain plans."""

    stem_width: int
    generator_widths: tuple[int, int, int]
    head_width: int
    max_tflop: float
    """Most operations a step may take, in 10^12; decides u."""
    upsampling: tuple[int, ...] = (4, 2)
    """Values of u to try, before 1."""


SAM_PROFILE = Profile(32, (256, 128, 64), 32, max_tflop=210.0)  # ACDC at u = 4, 20x256x224 in batch 2, takes 198
TINY_PROFILE = Profile(16, (64, 32, 16), 16, max_tflop=0.15, upsampling=(2,))  # a second or two a step on two CPU cores


def profile_of(backbone: str) -> Profile:
    """The tiny network's, or SAM's."""
    return TINY_PROFILE if backbone == "tiny" else SAM_PROFILE


def config_for(backbone: str, patch_size: tuple[int, ...], queries: int, regions: bool, **more: Any) -> MaskSAMConfig:
    """A config with the widths that go with the backbone, at u = 1 unless ``more`` says otherwise."""
    profile = profile_of(backbone)
    return MaskSAMConfig(
        backbone=backbone,
        patch_size=patch_size,
        num_queries=queries,
        regions=regions,
        stem_width=profile.stem_width,
        generator_widths=profile.generator_widths,
        head_width=profile.head_width,
        **{"upsample": 1, **more},
    )


def derive_config(
    plans: dict[str, Any], configuration_name: str, dataset_json: dict[str, Any], backbone: str
) -> MaskSAMConfig:
    """The config of ``backbone`` for a configuration of plain plans.

    u is the largest of 4 and 2 with u max(H, W) <= 1024 whose step fits the memory and operation targets, activation
    checkpointing tried before u is lowered; else 1.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name)
    labels = manager.get_label_manager(dataset_json)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    classes = labels.num_segmentation_heads
    patch_size = tuple(int(size) for size in configuration.patch_size)
    # K is only a bound on what one slice holds: plain plans do not say more.
    queries = min(num_queries(classes, backbone), MAX_QUERIES)
    config = config_for(backbone, patch_size, queries, labels.has_regions)
    return choose_upsampling(config, channels, classes, configuration.batch_size, profile_of(backbone))


def num_queries(targets: int, backbone: str) -> int:
    """N from the most targets that a slice may hold.

    Half as many again, rounded up to a multiple of eight, as in the paper's settings (8 for ACDC's 4, 24 for 14 and
    16), but no more than :data:`MAX_QUERIES` for headroom alone. The tiny network, made for CPUs, has at least one
    query to spare, rounded up to a multiple of four. Multiples let weights trained on one dataset fit another with
    nearly as many classes.
    """
    if backbone == "tiny":
        return round_up(targets + 1, 4)
    return max(8, min(round_up(3 * targets / 2, 8), MAX_QUERIES), round_up(targets, 8))


def round_up(number: float, step: int) -> int:
    """The next multiple of ``step``."""
    return math.ceil(number / step) * step


def choose_upsampling(
    config: MaskSAMConfig, channels: int, classes: int, batch_size: int, profile: Profile
) -> MaskSAMConfig:
    """The config with the largest u, and as little recomputation, as fits the targets."""

    def fits(cost: TrainingCost) -> bool:
        return cost.peak_gib <= MEMORY_GIB and cost.tflop <= profile.max_tflop

    for upsample in profile.upsampling:
        if upsample * max(config.patch_size[-2:]) > MAX_IMAGE:
            continue
        for checkpointing in (False, True):
            candidate = replace(config, upsample=upsample, checkpointing=checkpointing)
            if fits(training_cost(candidate, channels, classes, batch_size)):
                return candidate
    plain = replace(config, upsample=1, checkpointing=False)
    return plain if fits(training_cost(plain, channels, classes, batch_size)) else replace(plain, checkpointing=True)
