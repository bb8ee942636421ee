"""Patch, batch, r, backbone and checkpointing of a MaskSAM network under a memory target.

A patch shows SAM whole slices, as SAM was trained on whole images and as the paper's recipes do (4x256x256, 26x256x256,
9x512x512): the slices are as large as the median image, and memory decides their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import TrainingCost, training_cost
from masksam_nnunet.errors import DataError

from .architecture import CARD_GB, USABLE, config_for, num_queries, profile_of, round_up
from .presets import Preset
from .raw_check import TargetCount

FEW_SLICES = 4  # the paper's smallest patch: fewer are taken only where more do not fit
MIN_IN_PLANE = 64
MIN_BATCH = 2  # nnU-Net's
LARGEST_FIRST = ("vit_h", "vit_l", "vit_b", "lite_medsam")


@dataclass(frozen=True)
class Requirements:
    """What a configuration requires of the network.

    Attributes:
        median_shape: median image in voxels at the configuration's spacing, (D, H, W) or (H, W).
        channels: C, with a cascade's one-hot channels.
        classes: K.
        regions: whether the classes are regions.
        intensity_ranges: black and white of each image channel.
        targets: the slice with the most targets.
        largest_batch: gives the largest allowed batch for a patch of so many voxels.
    """

    median_shape: tuple[int, ...]
    channels: int
    classes: int
    regions: bool
    intensity_ranges: tuple[tuple[float, float], ...]
    targets: TargetCount
    largest_batch: Callable[[int], int]


@dataclass(frozen=True)
class Sizes:
    """A network, its batch size, its cost, and the reason for each of its sizes, by name."""

    config: MaskSAMConfig
    batch_size: int
    cost: TrainingCost
    reasons: dict[str, str] = field(default_factory=dict)

    def table(self, epochs: int) -> list[dict[str, Any]]:
        """Rows of what, value and why, as plain JSON; hours are for ``epochs`` of 250 iterations."""
        config, cost = self.config, self.cost
        *depth, height, width = config.patch_size
        values = {
            "backbone": config.backbone,
            **({"D": depth[0]} if depth else {}),
            "H x W": f"{height} x {width}",
            "r": f"{config.resolution:g}",
            "N": config.num_queries,
            "batch size": self.batch_size,
            "checkpointing": "on" if config.checkpointing else "off",
            "memory": f"{cost.peak_gib:.1f} GiB",
            "operations": f"{cost.tflop:.3g} TFLOP",
        }
        seen = f"the encoder sees {config.resolution * height:g} x {config.resolution * width:g}"
        hours = 250 * epochs * cost.tflop / 100 / 3600
        why = {
            "memory": "estimated, for a training step in bfloat16",
            "operations": f"a step; {epochs} epochs at 100 TFLOP/s: {hours:.3g} hours",
            **self.reasons,
            "r": f"{self.reasons['r']}; {seen}",
        }
        return [{"what": what, "value": value, "why": why[what]} for what, value in values.items()]


def choose_sizes(wanted: Requirements, backbones: tuple[str, ...], gpu_memory_gb: float) -> Sizes:
    """The first backbone that fits, with the largest r for :data:`FEW_SLICES` slices, then as many slices as fit.

    Activation checkpointing is used before a slice or r is given up. Patches of fewer than :data:`FEW_SLICES` slices,
    and then of parts of slices, are used only where no r fits. The bound on operations grows with the memory, as cards
    do.

    Raises:
        DataError: no backbone fits; it names the memory that the smallest one needs.
    """
    for number, backbone in enumerate(backbones):
        search = _Search(wanted, backbone, gpu_memory_gb)
        found = search.best()
        if found is not None:
            tried = ", ".join(backbones[:number])
            why = f"the largest SAM that fits; {tried} would not" if tried else "the largest SAM, fits"
            most = wanted.targets
            queries = f"up to {most.most} targets in a slice ({most.case}, slice {most.slice}), and headroom"
            reasons = {"backbone": why if len(backbones) > 1 else "as asked", "N": queries, **found.reasons}
            return replace(found, reasons=reasons)
    least = search.smallest
    needed = least.cost.peak_gib / USABLE + 0.1
    smaller = "" if backbones[-1] in (LARGEST_FIRST[-1], "tiny") else ", or a smaller --backbone"
    raise DataError(
        f"--gpu-memory {gpu_memory_gb:g} is too small for {backbones[-1]} with its smallest patch "
        f"{least.config.patch_size}; give --gpu-memory {needed:.1f} or more{smaller}"
    )


def preset_sizes(preset: Preset, wanted: Requirements, gpu_memory_gb: float) -> Sizes:
    """The published setting, whatever memory it takes; only checkpointing, which changes no result, is chosen."""
    config = config_for(
        preset.backbone,
        preset.patch_size,
        preset.num_queries,
        False,
        intensity_ranges=wanted.intensity_ranges,
        resolution=preset.resolution,
        loss=preset.loss,
    )
    inputs = (wanted.channels, wanted.classes, preset.batch_size, wanted.targets.most)
    cost = training_cost(config, *inputs)
    without = cost.peak_gib
    if without > gpu_memory_gb * USABLE:
        config = replace(config, checkpointing=True)
        cost = training_cost(config, *inputs)
    keys = {"backbone": "backbone", "D": "patch_size", "H x W": "patch_size", "r": "resolution"}
    keys |= {"N": "num_queries", "batch size": "batch_size"}
    reasons = {name: f"--preset {preset.name}: {preset.sources[key]}" for name, key in keys.items()}
    reasons["checkpointing"] = f"without it {without:.1f} GiB" if config.checkpointing else "not needed for this memory"
    if cost.peak_gib > gpu_memory_gb * USABLE:
        reasons["memory"] = f"more than --gpu-memory {gpu_memory_gb:g} leaves; the published setting was kept"
    return Sizes(config, preset.batch_size, cost, reasons)


class _Search:
    """The search for one backbone."""

    def __init__(self, wanted: Requirements, backbone: str, gpu_memory_gb: float) -> None:
        self.wanted = wanted
        self.backbone = backbone
        self.memory_gib = gpu_memory_gb * USABLE
        profile = profile_of(backbone)
        self.max_tflop = profile.max_tflop * (1 if backbone == "tiny" else gpu_memory_gb / CARD_GB)
        self.is_2d = len(wanted.median_shape) == 2
        self.depth = 1 if self.is_2d else max(1, wanted.median_shape[0])
        *most, least = profile.resolutions
        self.image_size = BACKBONES[backbone].image_size
        # What is larger at the smallest r is cut.
        plane = tuple(min(round_up(size, 16), int(self.image_size / least)) for size in wanted.median_shape[-2:])
        self.resolutions = [r for r in most if r * max(plane) <= self.image_size] + [least]
        self.why_r = "the largest there is"
        if self.resolutions[0] != profile.resolutions[0]:
            self.why_r = f"more would exceed the encoder's input of {self.image_size}"
        self.planes = [plane]
        """Ever smaller slices, to the smallest."""
        while max(plane) > MIN_IN_PLANE:
            plane = tuple(min(side, max(MIN_IN_PLANE, round_up(side * 3 // 4, 16))) for side in plane)
            self.planes.append(plane)

    @property
    def smallest(self) -> Sizes:
        """The least that this backbone can be planned with."""
        return self._sizes(1, self.planes[-1], self.resolutions[-1])

    def best(self) -> Sizes | None:
        few, plane = min(self.depth, FEW_SLICES), self.planes[0]
        for resolution in self.resolutions:
            # The smallest is always legal, however many operations it takes.
            start = self._sizes(few, plane, resolution)
            if self._fits(start, operations=resolution > self.resolutions[-1]):
                cut = max(plane) * self.resolutions[-1] >= self.image_size
                whole = f"at most the encoder's input of {self.image_size}" if cut else "the median slice, whole"
                why_r = self.why_r if resolution == self.resolutions[0] else "more does not fit"
                largest = self._largest(
                    start, few, self.depth, partial(self._sizes, plane=plane, resolution=resolution)
                )
                return self._polish(largest, {"r": why_r, "H x W": whole})
        if not self._fits(self.smallest, operations=False):
            return None
        plane = next(p for p in self.planes if self._fits(self._sizes(1, p, self.resolutions[-1]), operations=False))
        fewer = (self._sizes(depth, plane, self.resolutions[-1]) for depth in range(few, 0, -1))
        sizes = next(sizes for sizes in fewer if self._fits(sizes, operations=False))
        return self._polish(sizes, {"r": "more does not fit", "H x W": "as much as fits"})

    def _sizes(
        self,
        depth: int,
        plane: tuple[int, ...],
        resolution: float = 1,
        batch: int = MIN_BATCH,
        checkpointing: bool = True,
    ) -> Sizes:
        wanted = self.wanted
        config = config_for(
            self.backbone,
            plane if self.is_2d else (depth, *plane),
            num_queries(wanted.targets.most, self.backbone),
            wanted.regions,
            intensity_ranges=wanted.intensity_ranges,
            resolution=resolution,
            checkpointing=checkpointing,
        )
        cost = training_cost(config, wanted.channels, wanted.classes, batch, wanted.targets.most)
        return Sizes(config, batch, cost)

    def _fits(self, sizes: Sizes, operations: bool = True) -> bool:
        cost = sizes.cost
        return cost.peak_gib <= self.memory_gib and (not operations or cost.tflop <= self.max_tflop)

    def _largest(self, start: Sizes, at: int, limit: int, make: Callable[[int], Sizes]) -> Sizes:
        """What ``make`` gives for the largest number up to ``limit`` that fits; ``start``, for ``at``, is the least.

        Both costs are nearly linear in the number: few points tell where to look.
        """
        if at >= limit or not self._fits(start):
            return start
        low, high = (at, start), (limit, make(limit))
        if self._fits(high[1]):
            return high[1]
        for _ in range(5):
            gap = high[0] - low[0]
            if gap <= 1:
                break
            below, above = low[1].cost, high[1].cost
            share = min(
                _share(below.peak_gib, above.peak_gib, self.memory_gib),
                _share(below.tflop, above.tflop, self.max_tflop),
            )
            number = low[0] + min(gap - 1, max(1, int(share * gap)))
            middle = (number, make(number))
            low, high = (middle, high) if self._fits(middle[1]) else (low, middle)
        return low[1]

    def _polish(self, sizes: Sizes, reasons: dict[str, str]) -> Sizes:
        """Where the patch is whole, a larger batch; then no checkpointing, if memory allows."""
        depth = 1 if self.is_2d else sizes.config.patch_size[0]
        if not self.is_2d:
            reasons["D"] = (
                f"all {self.depth} slices of the median image"
                if depth == self.depth
                else f"as many of {self.depth} slices as fit {self._bound(sizes.cost)}"
            )
        make = partial(self._sizes, depth, sizes.config.patch_size[-2:], sizes.config.resolution)
        largest = self.wanted.largest_batch(math.prod(sizes.config.patch_size))
        reasons["batch size"] = f"nnU-Net's least is {MIN_BATCH}"
        if largest > MIN_BATCH and depth == self.depth:
            sizes = self._largest(sizes, MIN_BATCH, largest, make)
            at_most = "nnU-Net's own, or 5 % of the data"
            reasons["batch size"] = at_most if sizes.batch_size == largest else f"fits {self._bound(sizes.cost)}"
        plain = make(sizes.batch_size, checkpointing=False)
        reasons["checkpointing"] = f"without it {plain.cost.peak_gib:.1f} GiB"
        if self._fits(plain, operations=False):
            sizes = plain
            reasons["checkpointing"] = "not needed for this memory"
        return replace(sizes, reasons=reasons)

    def _bound(self, cost: TrainingCost) -> str:
        """Which of the two bounds is nearer."""
        if cost.peak_gib / self.memory_gib >= cost.tflop / self.max_tflop:
            return f"{self.memory_gib:.1f} GiB"
        return f"{self.max_tflop:g} TFLOP a step"


def _share(low: float, high: float, target: float) -> float:
    """Where the target lies between low and high, the whole way where they are one."""
    return (target - low) / (high - low) if high > low else 1.0
