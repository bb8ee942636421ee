"""Estimate memory and operations of a training step by running the real network and loss without allocating."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Grid, MaskSAMConfig
from .losses.criterion import MaskSAMCriterion, SemanticCriterion
from .losses.masks import CPU_PIECE, GPU_PIECE
from .losses.matching import Matches
from .losses.targets import Targets
from .metering import Meter
from .method import MASKSAM, build_network
from .modeling.network import queries_at_once

OPTIMIZER_BYTES = 8  # AdamW keeps two float32 numbers for each trained parameter

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class TrainingCost:
    """Estimated for one GPU."""

    peak_bytes: int
    """Largest memory alive during a step: weights, gradients, optimizer state, activations and temporaries."""
    flops: int
    """Floating-point operations of forward and backward pass."""

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / 2**30

    @property
    def tflop(self) -> float:
        return self.flops / 1e12


def _norms_in_float32(network: nn.Module) -> None:
    """Run norms in float32, as CUDA's autocast does and the CPU's does not. By hooks, which recomputation meets too."""

    def widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in inputs)

    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.register_forward_pre_hook(widen)


class _GivenTargets(MaskSAMCriterion):
    """The real loss with the largest number of targets in every slice: fake tensors hold no labels."""

    targets_per_slice: int
    ignores = False
    """Whether there are ignored voxels."""

    def find_targets(self, segmentation: Tensor) -> Targets:
        _, height, width = self.grid.patch
        slices = segmentation.shape[0] * self.grid.patch[0]
        return Targets(
            torch.arange(self.targets_per_slice).clamp(max=self.num_classes - 1).expand(slices, -1),
            torch.zeros(slices, self.targets_per_slice, height, width, dtype=torch.bool),
            torch.zeros(slices, self.targets_per_slice, 4),
            torch.zeros(slices, height, width, dtype=torch.bool) if self.ignores else None,
            self.num_classes,
        )

    def assign(self, cost: Tensor | None, targets: Targets) -> Matches:
        slices, number = targets.classes.shape
        column = torch.arange(number).repeat(slices)
        return Matches(torch.arange(slices).repeat_interleave(number), column, column)


def dice_and_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """A loss that takes as much memory as nnU-Net's own Dice and cross-entropy."""
    if target.shape[1] > 1:  # regions
        scores, truth = logits.sigmoid(), target.bool()
        entropy = F.binary_cross_entropy_with_logits(logits, target)
    else:
        scores, labels = logits.softmax(1), target.long()
        truth = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, labels, True)
        entropy = F.cross_entropy(logits, labels[:, 0])
    return entropy - (scores * truth).sum() / scores.sum()


def training_cost(
    config: MaskSAMConfig,
    in_channels: int,
    num_classes: int,
    batch_size: int,
    precision: Precision = "bfloat16",
    ignores: bool = False,
) -> TrainingCost:
    """Peak memory and operations of a training step, without a GPU and without allocating.

    Args:
        config: of the network.
        in_channels: C.
        num_classes: K.
        batch_size: B.
        precision: bfloat16 as on a GPU, whose autocast is followed; or float32 throughout, as on a CPU.
        ignores: whether the dataset has an ignore label.
    """
    queries = config.queries(num_classes)
    most = queries if config.anchored else max(1, min(num_classes, queries))  # targets in a slice
    tokens = batch_size * math.prod((Grid.of(config).patch[0], *Grid.of(config).tokens))
    if config.method != MASKSAM or queries <= 4 or queries_at_once(config, queries, tokens, training=True) > 1:
        return _run(config, in_channels, num_classes, batch_size, most, precision, ignores)
    # Linear in N, and half of the time would be spent on decoding one query after another.
    if config.anchored:  # N follows from K
        number = num_classes
        two, three = (_run(config, in_channels, n, batch_size, config.queries(n), precision, ignores) for n in (2, 3))
    else:
        number = queries
        settings = in_channels, num_classes, batch_size, most, precision, ignores
        two, three = (_run(replace(config, num_queries=n), *settings) for n in (2, 3))
    return TrainingCost(
        two.peak_bytes + (number - 2) * (three.peak_bytes - two.peak_bytes),
        two.flops + (number - 2) * (three.flops - two.flops),
    )


@lru_cache(maxsize=1024)
def _run(
    config: MaskSAMConfig,
    in_channels: int,
    num_classes: int,
    batch_size: int,
    targets: int,
    precision: Precision,
    ignores: bool = False,
) -> TrainingCost:
    """The cost of one step.

    A :class:`~.metering.Meter`'s tensors take the fused attention path and respect autocast, as a GPU's do; the meta
    device's do neither. Their values are never read, so there may be more targets than queries.
    """
    low = precision == "bfloat16"
    with Meter() as meter:
        # A cascade's channels come after those of the image.
        network = build_network(config, in_channels, num_classes, len(config.intensity_ranges) or None).train()
        if low:
            _norms_in_float32(network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        criterion: nn.Module = SemanticCriterion(config, dice_and_cross_entropy)
        if config.method == MASKSAM:
            criterion = _GivenTargets(config, num_classes, semantic_loss=dice_and_cross_entropy)
            criterion.targets_per_slice, criterion.ignores = targets, ignores
            criterion.piece = GPU_PIECE if low else CPU_PIECE
        x = torch.zeros(batch_size, in_channels, *config.patch_size)
        channels = num_classes if config.regions else 1
        segmentation = torch.zeros(batch_size, channels, *config.patch_size)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = network(x)
        loss, _ = criterion(output, segmentation)
        loss.backward()
    return TrainingCost(meter.peak + OPTIMIZER_BYTES * trained, meter.flops)
