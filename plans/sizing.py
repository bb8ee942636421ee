"""Patch, batch, r, backbone and checkpointing of a MaskSAM network for the memory of a device and for hours.

A patch shows SAM whole slices, as SAM was trained on whole images and as the paper's recipes do (4x256x256, 26x256x256,
9x512x512): the slices are as large as the median image; memory and time decide their number.
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

from .architecture import USABLE, config_for, profile_of, round_up, unet_config
from .presets import Preset
from .speed import FEW_EPOCHS, FULL_EPOCHS, Device

FEW_SLICES = 4  # the paper's smallest patch: fewer are taken only where more do not fit
MIN_IN_PLANE = 64
MIN_BATCH = 2  # nnU-Net's
LARGEST_FIRST = ("vit_h", "vit_l", "vit_b", "lite_medsam")
GENERATORS = {
    "light": "over SAM's features alone",
    "unet": "nnU-Net's U-Net, with SAM's features",
    "resenc": "nnU-Net's residual U-Net, with SAM's features",
}
"""Of prompts, each in words."""


@dataclass(frozen=True)
class Requirements:
    """What a configuration requires of the network.

    Attributes:
        median_shape: median image in voxels at the configuration's spacing, (D, H, W) or (H, W).
        channels: C, with a cascade's one-hot channels.
        classes: K.
        regions: whether the classes are regions.
        ignores: whether the dataset has an ignore label.
        intensity_ranges: black and white of each image channel.
        spacing: of the patch's axes.
        generator: of the prompts, one of :data:`GENERATORS`.
        largest_batch: gives the largest allowed batch for a patch of so many voxels.
    """

    median_shape: tuple[int, ...]
    channels: int
    classes: int
    regions: bool
    ignores: bool
    intensity_ranges: tuple[tuple[float, float], ...]
    spacing: tuple[float, ...]
    generator: str
    largest_batch: Callable[[int], int]


@dataclass(frozen=True)
class Sizes:
    """A network for K classes, its batch size, its cost, and the reason for each of its sizes, by name."""

    config: MaskSAMConfig
    batch_size: int
    cost: TrainingCost
    classes: int
    reasons: dict[str, str] = field(default_factory=dict)

    def table(self, epochs: int, limits: Limits, theirs: float) -> list[dict[str, Any]]:
        """Rows of what, value and why, as plain JSON; ``theirs``: operations of a step of nnU-Net's, in 10^12."""
        config, cost, device = self.config, self.cost, limits.device
        *depth, height, width = config.patch_size
        hours, full, other = (
            device.hours(*step) for step in ((cost.tflop, epochs), (cost.tflop, FULL_EPOCHS), (theirs, FULL_EPOCHS))
        )
        values = {
            "backbone": config.backbone,
            **({"D": depth[0]} if depth else {}),
            "H x W": f"{height} x {width}",
            "r": f"{config.resolution:g}",
            "generator": config.generator.kind,
            "N": config.queries(self.classes),
            "batch size": self.batch_size,
            "checkpointing": "on" if config.checkpointing else "off",
            "memory": f"{cost.peak_gib:.1f} GiB",
            "operations": f"{cost.tflop:.3g} TFLOP",
            "epochs": epochs,
            "time": f"{hours:.3g} hours a fold, {5 * hours:.3g} for five",
        }
        seen = f"the encoder sees {config.resolution * height:g} x {config.resolution * width:g}"
        excess = f"; more than --hours {limits.hours:g}" if hours > limits.hours else ""
        why = {
            "memory": f"estimated, for a training step in {device.precision}",
            "operations": f"a step; nnU-Net's takes {theirs:.3g} TFLOP",
            "epochs": "nnU-Net's own"
            if epochs == FULL_EPOCHS
            else f"{FULL_EPOCHS} would take {full:.3g} hours, more than --hours {limits.hours:g}",
            "time": f"{device.tflops:.3g} TFLOP/s on {device.name} ({device.source}); nnU-Net by the same rule: "
            f"{other:.3g} hours a fold, {5 * other:.3g} for five{excess}",
            **self.reasons,
            "r": f"{self.reasons['r']}; {seen}",
        }
        return [{"what": what, "value": value, "why": why[what]} for what, value in values.items()]


@dataclass(frozen=True)
class Limits:
    """What a training may take."""

    memory_gb: float
    hours: float
    """Of a fold."""
    device: Device

    @property
    def memory_gib(self) -> float:
        return self.memory_gb * USABLE


def choose_sizes(wanted: Requirements, backbones: tuple[str, ...], limits: Limits) -> Sizes:
    """The backbone and r, then as many slices as fit, then the batch size.

    The first backbone is taken that, at the largest r at which its encoder was trained, fits memory and time with
    :data:`FEW_SLICES` slices and :data:`FEW_EPOCHS` epochs; if none does, at the next smaller r, and so on. Slices and
    batch grow only as far as all :data:`FULL_EPOCHS` epochs fit. If nothing fits, it is the last backbone's smallest
    r with what fits the memory, whatever time it takes. Activation checkpointing is used where memory needs it.

    Raises:
        DataError: no backbone fits the memory; it names what the smallest one needs.
    """
    searches = [_Search(wanted, backbone, limits) for backbone in backbones]
    for step in range(max(len(search.resolutions) for search in searches)):
        for search in searches:
            found = search.at(step)
            if found is not None:
                return _explained(found, "the largest SAM that fits memory and time", wanted, len(backbones))
    search = searches[-1]
    found = search.anyhow()
    if found is not None:
        return _explained(found, f"the smallest SAM: none fits with {FEW_EPOCHS} epochs", wanted, len(backbones))
    least = search.smallest
    needed = least.cost.peak_gib / USABLE + 0.1
    smaller = "" if backbones[-1] in (LARGEST_FIRST[-1], "tiny") else ", or a smaller --backbone"
    raise DataError(
        f"--gpu-memory {limits.memory_gb:g} is too small for {backbones[-1]} with its smallest patch "
        f"{least.config.patch_size}; give --gpu-memory {needed:.1f} or more{smaller}"
    )


def _explained(sizes: Sizes, why: str, wanted: Requirements, candidates: int) -> Sizes:
    queries = f"one for each {'region' if wanted.regions else 'class, background too'}"
    reasons = {
        "backbone": why if candidates > 1 else "as asked",
        "generator": GENERATORS[wanted.generator],
        "N": queries,
        **sizes.reasons,
    }
    return replace(sizes, reasons=reasons)


def preset_sizes(preset: Preset, wanted: Requirements, limits: Limits) -> Sizes:
    """The published setting, whatever memory it takes; only checkpointing, which changes no result, is chosen."""
    config = config_for(
        preset.backbone,
        preset.patch_size,
        False,
        num_queries=preset.num_queries,
        matching=preset.matching,
        intensity_ranges=wanted.intensity_ranges,
        resolution=preset.resolution,
        loss=preset.loss,
    )
    inputs = wanted.channels, wanted.classes, preset.batch_size, limits.device.precision, wanted.ignores
    cost = training_cost(config, *inputs)
    without = cost.peak_gib
    if without > limits.memory_gib:
        config = replace(config, checkpointing=True)
        cost = training_cost(config, *inputs)
    keys = {"backbone": "backbone", "D": "patch_size", "H x W": "patch_size", "r": "resolution"}
    keys |= {"N": "num_queries", "generator": "matching", "batch size": "batch_size", "epochs": "epochs"}
    reasons = {name: f"--preset {preset.name}: {preset.sources[key]}" for name, key in keys.items()}
    reasons["checkpointing"] = f"without it {without:.1f} GiB" if config.checkpointing else "not needed for this memory"
    if cost.peak_gib > limits.memory_gib:
        reasons["memory"] = f"more than --gpu-memory {limits.memory_gb:g} leaves; the published setting was kept"
    return Sizes(config, preset.batch_size, cost, wanted.classes, reasons)


class _Search:
    """The search for one backbone."""

    def __init__(self, wanted: Requirements, backbone: str, limits: Limits) -> None:
        self.wanted = wanted
        self.backbone = backbone
        self.memory_gib, self.precision = limits.memory_gib, limits.device.precision
        profile = profile_of(backbone)
        # More than a second or two a step is too much for the tiny encoder, anywhere.
        self.most_anywhere = profile.max_tflop if backbone == "tiny" else math.inf
        self.max_tflop, self.start_tflop = (
            min(self.most_anywhere, limits.device.most_tflop(limits.hours, epochs))
            for epochs in (FULL_EPOCHS, FEW_EPOCHS)
        )
        self.least_tflop = 0.0
        """What the start of the next smaller r takes at least."""
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

    def at(self, step: int) -> Sizes | None:
        """The network at one of the resolutions, from the largest; None where it does not fit."""
        if step >= len(self.resolutions):
            return None
        resolution, plane = self.resolutions[step], self.planes[0]
        if step:  # work grows with at most the square of the pixels
            self.least_tflop *= (resolution / self.resolutions[step - 1]) ** 4
        if self.least_tflop > self.start_tflop:
            return None
        few = min(self.depth, FEW_SLICES)
        start = self._sizes(few, plane, resolution)
        self.least_tflop = start.cost.tflop
        if not self._fits(start, self.start_tflop):
            return None
        cut = max(plane) * self.resolutions[-1] >= self.image_size
        whole = f"at most the encoder's input of {self.image_size}" if cut else "the median slice, whole"
        why_r = "more does not fit" if step else self.why_r
        sizes = self._largest(start, few, self.depth, partial(self._sizes, plane=plane, resolution=resolution))
        return self._polish(sizes, {"r": why_r, "H x W": whole})

    def anyhow(self) -> Sizes | None:
        """The smallest resolution with what fits the memory, whatever time it takes."""
        self.start_tflop, resolution = math.inf, self.resolutions[-1]
        few = min(self.depth, FEW_SLICES)
        if not self._fits(self.smallest):
            return None
        # Slices are given up before parts of them.
        plane = next(p for p in self.planes if self._fits(self._sizes(1, p, resolution)))
        fewer = (self._sizes(depth, plane, resolution) for depth in range(few, 0, -1))
        sizes = next(sizes for sizes in fewer if self._fits(sizes))
        whole = "the median slice, whole" if plane == self.planes[0] else "as much as fits"
        return self._polish(sizes, {"r": "the smallest: more does not fit", "H x W": whole})

    def _sizes(self, depth: int, plane: tuple[int, ...], resolution: float = 1, batch: int = MIN_BATCH) -> Sizes:
        """With activation checkpointing where memory needs it and time allows it."""
        wanted = self.wanted
        patch = plane if self.is_2d else (depth, *plane)
        config = config_for(
            self.backbone,
            patch,
            wanted.regions,
            intensity_ranges=wanted.intensity_ranges,
            resolution=resolution,
            unet=None
            if wanted.generator == "light"
            else unet_config(wanted.spacing, patch, wanted.generator == "resenc"),
        )
        inputs = wanted.channels, wanted.classes, batch, self.precision, wanted.ignores
        plain = training_cost(config, *inputs)
        reasons = {"checkpointing": "not needed for this memory"}
        if plain.peak_gib <= self.memory_gib or plain.tflop > self.start_tflop:
            return Sizes(config, batch, plain, wanted.classes, reasons)
        config = replace(config, checkpointing=True)
        reasons = {"checkpointing": f"without it {plain.peak_gib:.1f} GiB"}
        return Sizes(config, batch, training_cost(config, *inputs), wanted.classes, reasons)

    def _fits(self, sizes: Sizes, most_tflop: float = math.inf) -> bool:
        return sizes.cost.peak_gib <= self.memory_gib and sizes.cost.tflop <= most_tflop

    def _largest(self, start: Sizes, at: int, limit: int, make: Callable[[int], Sizes]) -> Sizes:
        """What ``make`` gives for the largest number up to ``limit`` that fits; ``start``, for ``at``, is the least.

        Both costs are nearly linear in the number: few points tell where to look.
        """
        if at >= limit or not self._fits(start, self.max_tflop):
            return start
        low, high = (at, start), (limit, make(limit))
        if self._fits(high[1], self.max_tflop):
            return high[1]
        for _ in range(8):
            gap = high[0] - low[0]
            if gap <= 1:
                break
            below, above = low[1].cost, high[1].cost
            share = 0.5  # between one with and one without checkpointing
            if low[1].config.checkpointing == high[1].config.checkpointing:
                share = min(
                    _share(below.peak_gib, above.peak_gib, self.memory_gib),
                    _share(below.tflop, above.tflop, self.max_tflop),
                )
            number = low[0] + min(gap - 1, max(1, int(share * gap)))
            middle = (number, make(number))
            low, high = (middle, high) if self._fits(middle[1], self.max_tflop) else (low, middle)
        return low[1]

    def _polish(self, sizes: Sizes, reasons: dict[str, str]) -> Sizes:
        """Where the patch is whole, a larger batch."""
        depth = 1 if self.is_2d else sizes.config.patch_size[0]
        slow = sizes.cost.tflop > self.max_tflop
        if not self.is_2d:
            if depth == self.depth:
                reasons["D"] = f"all {self.depth} slices of the median image"
            elif depth < FEW_SLICES:
                reasons["D"] = f"as many of {self.depth} slices as fit {self.memory_gib:.1f} GiB"
            elif slow:
                reasons["D"] = f"of {self.depth} slices; even these take more than {self._most_tflop()}"
            else:
                reasons["D"] = f"as many of {self.depth} slices as fit {self._bound(sizes.cost)}"
        make = partial(self._sizes, depth, sizes.config.patch_size[-2:], sizes.config.resolution)
        largest = self.wanted.largest_batch(math.prod(sizes.config.patch_size))
        reasons["batch size"] = f"nnU-Net's least is {MIN_BATCH}"
        if largest > MIN_BATCH and depth == self.depth and not slow:
            sizes = self._largest(sizes, MIN_BATCH, largest, make)
            at_most = "nnU-Net's own, or 5 % of the data"
            reasons["batch size"] = at_most if sizes.batch_size == largest else f"fits {self._bound(sizes.cost)}"
        return replace(sizes, reasons=reasons | sizes.reasons)

    def _bound(self, cost: TrainingCost) -> str:
        """Which of the two bounds is nearer."""
        if cost.peak_gib / self.memory_gib >= cost.tflop / self.max_tflop:
            return f"{self.memory_gib:.1f} GiB"
        return self._most_tflop()

    def _most_tflop(self) -> str:
        tiny = self.max_tflop == self.most_anywhere
        return f"{self.max_tflop:.3g} TFLOP a step, the most for {'this encoder' if tiny else f'{FULL_EPOCHS} epochs'}"


def _share(low: float, high: float, target: float) -> float:
    """Where the target lies between low and high, the whole way where they are one."""
    return (target - low) / (high - low) if high > low else 1.0
