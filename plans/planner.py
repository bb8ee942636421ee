"""nnU-Net's planner with a MaskSAM network; spacing, normalization, resampling and data stay nnU-Net's."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet import __version__
from masksam_nnunet.environment import variable
from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import atomic_write, read_json, write_text_atomically

from .architecture import (
    BASE_PLANS,
    DECISIONS,
    EPOCHS,
    intensity_ranges,
    open_configuration,
    write_config,
)
from .presets import Preset
from .raw_data import RawDataset
from .sizing import Limits, Requirements, Sizes, choose_sizes, preset_sizes
from .speed import unet_tflop

CASCADE, FULL, LOW = "3d_cascade_fullres", "3d_fullres", "3d_lowres"


class MaskSAMPlanner(ExperimentPlanner):
    """Plans with a MaskSAM network in each configuration.

    Spacing, normalization, resampling and the identifier of the preprocessed data come from ``nnUNetPlans.json`` where
    it exists, so that both methods train on the same files. Else nnU-Net's planner makes them.

    nnU-Net looks for planners in its own folders only, so ``masksam plan`` is the command for this one.

    Args:
        raw: the raw dataset.
        limits: memory and hours of a training, and the device.
        plans_name: name of the file, without ``.json``.
        backbones: to be tried in this order.
        configurations: to plan; all that nnU-Net has if empty.
        preset: a published setting, or None.
        generator: of the prompts, ``light``, ``unet`` or ``resenc``.
    """

    def __init__(
        self,
        raw: RawDataset,
        limits: Limits,
        plans_name: str,
        backbones: tuple[str, ...],
        configurations: Sequence[str] = (),
        preset: Preset | None = None,
        generator: str = "light",
    ) -> None:
        # The U-Net that nnU-Net plans first must be the one of nnUNetPlans: lowres spacing depends on it.
        super().__init__(raw.name, plans_name=plans_name)
        self.raw, self.limits = raw, limits
        self.backbones, self.wanted, self.preset = backbones, tuple(configurations), preset
        self.generator = generator
        self.folder = Path(nnUNet_preprocessed) / self.dataset_name
        self.file = self.folder / f"{plans_name}.json"
        self.planned: list[str] = []
        """The configurations of the last call, in nnU-Net's order."""
        self.expected_hours: dict[str, float] = {}
        """Of a fold's training, for each of them that has a network of its own."""
        self.labels = raw.label_manager
        self.channels = len(self.dataset_json["channel_names"])

    def generate_data_identifier(self, configuration_name: str) -> str:
        """That of nnU-Net's own plans."""
        return f"{BASE_PLANS}_{configuration_name}"

    def plan_experiment(self) -> dict[str, Any]:
        """Make the plans and save them atomically.

        Raises:
            DataError: nnU-Net has no such configuration, labels do not fit a preset, a plans file of that name is not
                this planner's, or memory is too small.
        """
        preset = self.preset
        if preset is not None:
            classes = self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
            preset.check_labels(len(classes), self.labels.has_regions, self.channels)
        earlier = self._earlier_plans()
        base = self._base_plans()
        names = self._configurations(base)

        self.planned = [name for name in base["configurations"] if name in names]
        kept = {k: v for k, v in earlier.get("configurations", {}).items() if k not in self.planned}
        configurations = kept | {name: base["configurations"][name] for name in self.planned}
        decisions = {k: v for k, v in earlier.get(DECISIONS, {}).items() if k in kept}
        plans = {
            **base,
            "plans_name": self.plans_identifier,
            "experiment_planner_used": type(self).__name__,
            "configurations": configurations,
            DECISIONS: decisions,
        }
        for name in self.planned:
            if name == CASCADE:
                continue  # inherits all from 3d_fullres
            sizes = self._sizes(base, name, cascade=CASCADE in configurations and name == FULL)
            theirs = unet_tflop(
                PlansManager(base).get_configuration(name), self.channels, self.labels.num_segmentation_heads
            )
            configurations[name]["patch_size"] = list(sizes.config.patch_size)
            configurations[name]["batch_size"] = sizes.batch_size
            write_config(plans, name, sizes.config)
            epochs = preset.epochs if preset else self.limits.device.epochs(sizes.cost.tflop, self.limits.hours)
            self.expected_hours[name] = self.limits.device.hours(sizes.cost.tflop, epochs)
            decisions[name] = {
                "version": __version__,
                "gpu_memory_gb": self.limits.memory_gb,
                "hours": self.limits.hours,
                "preset": preset and preset.name,
                EPOCHS: epochs,
                "decided": sizes.table(epochs, self.limits, theirs),
            }
            if preset is not None:
                decisions[name] |= {"notes": list(preset.notes), "sources": preset.sources}
        if CASCADE not in configurations:  # nnU-Net would look for it after a validation of 3d_lowres
            configurations.get(LOW, {}).pop("next_stage", None)
        self.plans = plans
        # Like nnU-Net's planner: preprocessing and training read dataset.json there.
        with atomic_write(self.folder / "dataset.json") as draft:
            shutil.copyfile(self.raw.folder / "dataset.json", draft)
        # NaN is what nnU-Net writes where no case has foreground.
        write_text_atomically(self.file, json.dumps(plans, indent=4) + "\n")
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Called with nnU-Net's own plans, which are not written."""
        recursive_fix_for_json_export(plans)

    def _earlier_plans(self) -> dict[str, Any]:
        """The plans in the file, whose other configurations are kept; empty where there is none."""
        if not self.file.is_file():
            return {}
        earlier = _read_plans(self.file, self.dataset_name)
        if not isinstance(earlier.get(DECISIONS), dict):
            raise DataError(f"--plans-name {self.plans_identifier}: {self.file} was not written by masksam plan")
        return earlier

    def _base_plans(self) -> dict[str, Any]:
        file = self.folder / f"{BASE_PLANS}.json"
        if file.is_file():
            return _read_plans(file, self.dataset_name)
        with (
            contextlib.redirect_stdout(io.StringIO()),  # it prints U-Nets
            variable("nnUNet_n_proc_DA", None),  # 0, right for training, makes planning fail
        ):
            plans: dict[str, Any] = super().plan_experiment()
        return plans

    def _configurations(self, base: dict[str, Any]) -> Sequence[str]:
        available = [n for n in ("2d", FULL, LOW, CASCADE) if n in base["configurations"]]
        wanted, option = self.wanted, "-c"
        if self.preset is not None:
            option = f"--preset {self.preset.name}, which needs"
            if set(wanted) - {FULL}:
                raise DataError(f"-c {' '.join(wanted)}: --preset {self.preset.name} is a setting of {FULL} only")
            wanted = (FULL,)
        for name in wanted:
            if name not in available:
                raise DataError(f"{option} {name}: nnU-Net plans only {', '.join(available)} for {self.dataset_name}")
        # A cascade needs both of its configurations.
        return (FULL, LOW, *wanted) if CASCADE in wanted else wanted or available

    def _sizes(self, base: dict[str, Any], name: str, cascade: bool) -> Sizes:
        settings = PlansManager(base).get_configuration(name)
        # The cascade shares 3d_fullres's network, and adds one-hot maps of the previous stage.
        channels = self.channels + (len(self.labels.foreground_labels) if cascade else 0)
        dims = len(settings.patch_size)
        median = tuple(max(1, round(size)) for size in settings.median_image_size_in_voxels[-dims:])
        # As in nnU-Net, whole volumes count, for 2d too.
        full = base["configurations"].get(FULL)
        depth = full["median_image_size_in_voxels"][0] if full and dims == 2 else 1
        voxels = math.prod(median) * depth * len(self.dataset)

        def largest_batch(patch_voxels: int) -> int:
            share = round(voxels * self.max_dataset_covered / patch_voxels)
            return max(self.UNet_min_batch_size, min(share, settings.batch_size))

        wanted = Requirements(
            median_shape=median,
            channels=channels,
            classes=self.labels.num_segmentation_heads,
            regions=self.labels.has_regions,
            ignores=self.labels.has_ignore_label,
            intensity_ranges=intensity_ranges(base, settings.normalization_schemes, settings.use_mask_for_norm),
            spacing=tuple(settings.spacing),
            generator=self.generator,
            largest_batch=largest_batch,
        )
        if self.preset is not None:
            return preset_sizes(self.preset, wanted, self.limits)
        return choose_sizes(wanted, self.backbones, self.limits)


def _read_plans(file: Path, dataset: str) -> dict[str, Any]:
    """Plans of ``dataset``, all of whose configurations can be read; a DataError for other content."""
    try:
        plans: dict[str, Any] = read_json(file)
        if plans["dataset_name"] != dataset or not plans["configurations"]:
            raise ValueError(f"it is of {plans['dataset_name']}, or has no configuration")
        for name in plans["configurations"]:
            open_configuration(plans, name)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file} holds no plans for {dataset}: {in_short(error)}; remove it and plan again") from error
    return plans
