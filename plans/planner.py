"""nnU-Net's planner for MaskSAM: spacing, normalisation, resampling and data stay nnU-Net's, the network is ours."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet import __version__
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import training_cost
from masksam_nnunet.json_files import read_json, write_json

from .architecture import DECISIONS, write_config
from .derive import SAM_PROFILE, num_queries
from .errors import PlanError
from .presets import Preset
from .raw_data import read_raw_dataset
from .sizing import LARGEST_FIRST, USABLE, Sizes, Task, choose_sizes
from .slices import SliceCount, count_targets

BASE_PLANS = "nnUNetPlans"
CASCADE, FULL, LOW = "3d_cascade_fullres", "3d_fullres", "3d_lowres"


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        backbones: to be tried in this order.
        configurations: to plan; all that nnU-Net has if empty.
        preset: a published setting, or None.
    """

    backbones: tuple[str, ...] = LARGEST_FIRST
    configurations: tuple[str, ...] = ()
    preset: Preset | None = None


class MaskSAMPlanner(ExperimentPlanner):
    """Plans with a MaskSAM network in each configuration.

    Where ``nnUNetPlans.json`` is there, its configurations are the base: spacing, normalisation, resampling and the
    identifier of the preprocessed data are taken as they stand, so that both methods train on the same files. Else
    nnU-Net's planner makes them, under the identifiers that its own plans would have.

    nnU-Net looks planners up in its own folders only, so ``masksam plan`` is the command for this one.

    Args:
        dataset_name_or_id: as nnU-Net takes it.
        gpu_memory_target_in_gb: of the card to train on.
        preprocessor_name: nnU-Net's.
        plans_name: of the file to write.
        overwrite_target_spacing: of 3d_fullres; such plans have data of their own.
        suppress_transpose: nnU-Net's.
        request: what to plan.
        notify: is told what is being tried.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "MaskSAMPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        request: Request | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        # The U-Net that nnU-Net plans first must be the one of nnUNetPlans: lowres spacing depends on it.
        super().__init__(
            dataset_name_or_id,
            preprocessor_name=preprocessor_name,
            plans_name=plans_name,
            overwrite_target_spacing=overwrite_target_spacing,
            suppress_transpose=suppress_transpose,
        )
        self.gpu_memory_gb = float(gpu_memory_target_in_gb)
        self.request = request or Request()
        self.notify = notify
        self.planned: list[str] = []
        """Configurations of the last plans, in nnU-Net's order."""
        self.labels = LabelManager(dict(self.dataset_json["labels"]), self.dataset_json.get("regions_class_order"))
        self.channels = len(self.dataset_json["channel_names"])
        self._shares_data = overwrite_target_spacing is None and not suppress_transpose

    @property
    def folder(self) -> Path:
        """The dataset's preprocessed folder."""
        return Path(nnUNet_preprocessed) / self.dataset_name

    def generate_data_identifier(self, configuration_name: str) -> str:
        """nnU-Net's own: its data is ours, unless another spacing is forced."""
        return f"{BASE_PLANS if self._shares_data else self.plans_identifier}_{configuration_name}"

    def plan_experiment(self) -> dict[str, Any]:
        """Make the plans and save them, whole or not at all.

        Raises:
            PlanError: for a configuration that nnU-Net does not have, labels that cannot be read or do not fit a
                preset, or too little memory.
        """
        if self.request.preset is not None:
            foreground = len(
                self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
            )
            self.request.preset.check_labels(foreground, self.labels.has_regions, self.channels)
        base = self._base_plans()
        names = self._configurations(base)
        self.notify("reading the training labels")
        raw = read_raw_dataset(Path(self.raw_dataset_folder), "-d", min_cases=1)
        count = count_targets(raw.labels, raw.dataset_json, base["transpose_forward"][0])

        plans = {**base, "plans_name": self.plans_identifier, "experiment_planner_used": type(self).__name__}
        self.planned = [name for name in base["configurations"] if name in _with_parents(names)]
        plans["configurations"] = {name: base["configurations"][name] for name in self.planned}
        decisions: dict[str, Any] = {
            "version": __version__,
            "gpu_memory_gb": self.gpu_memory_gb,
            "preset": self.request.preset.name if self.request.preset else None,
            "targets_per_slice": {"most": count.most, "case": count.case, "slice": count.slice, "cases": count.cases},
            "configurations": {},
        }
        for name in self.planned:
            if name == CASCADE:
                continue  # inherits all from 3d_fullres
            sizes = self._sizes(base, name, count, cascade=CASCADE in self.planned and name == FULL)
            configuration = plans["configurations"][name]
            configuration["patch_size"] = list(sizes.config.patch_size)
            configuration["batch_size"] = sizes.batch_size
            write_config(plans, name, sizes.config)
            decisions["configurations"][name] = _decisions(sizes, count)
        if self.request.preset is None:
            plans[DECISIONS] = decisions
        else:
            notes = {"notes": list(self.request.preset.notes), "sources": self.request.preset.sources}
            plans[DECISIONS] = decisions | notes
        self.plans = plans
        self.save_plans(plans)
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans atomically, keeping configurations of other names that the file holds."""
        recursive_fix_for_json_export(plans)
        file = self.folder / f"{self.plans_identifier}.json"
        if file.is_file():
            before = read_json(file)
            for holder, earlier in ((plans, before), (plans[DECISIONS], before.get(DECISIONS, {}))):
                holder["configurations"] = earlier.get("configurations", {}) | holder["configurations"]
        if CASCADE not in plans["configurations"]:  # nnU-Net would look for it after a validation of 3d_lowres
            plans["configurations"].get(LOW, {}).pop("next_stage", None)
        write_json(file, plans)
        # nnU-Net's planner copies it too: training and preprocessing read it there.
        write_json(self.folder / "dataset.json", self.dataset_json)

    def _base_plans(self) -> dict[str, Any]:
        file = self.folder / f"{BASE_PLANS}.json"
        if self._shares_data and file.is_file():
            try:
                return deepcopy(read_json(file))
            except ValueError as error:
                raise PlanError(
                    f"{file} is not JSON: {error}; remove it and run nnUNetv2_plan_experiment -d {self._id}"
                ) from error
        stock = _InMemory(
            self.dataset_name,
            preprocessor_name=self.preprocessor_name,
            plans_name=BASE_PLANS if self._shares_data else self.plans_identifier,
            overwrite_target_spacing=self.overwrite_target_spacing,
            suppress_transpose=self.suppress_transpose,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of U-Nets
            return stock.plan_experiment()

    @property
    def _id(self) -> int:
        return int(self.dataset_name[len("Dataset") : len("Dataset000")])

    def _configurations(self, base: dict[str, Any]) -> Sequence[str]:
        available = [n for n in ("2d", FULL, LOW, CASCADE) if n in base["configurations"]]
        wanted = self.request.configurations
        if self.request.preset is not None:
            if set(wanted) - {FULL}:
                raise PlanError(
                    f"-c {' '.join(wanted)}: --preset {self.request.preset.name} is a setting of {FULL}; "
                    f"leave -c out or give -c {FULL}"
                )
            wanted = (FULL,)
        for name in wanted:
            if name not in available:
                raise PlanError(
                    f"-c {name}: nnU-Net plans no such configuration for {self.dataset_name}; "
                    f"choose of {', '.join(available)}"
                )
        return wanted or available

    def _sizes(self, base: dict[str, Any], name: str, count: SliceCount, cascade: bool) -> Sizes:
        settings = PlansManager(base).get_configuration(name)
        classes = self.labels.num_segmentation_heads
        # A cascade's one-hot maps of the previous stage; its network is planned with 3d_fullres, whose it is.
        channels = self.channels + (len(self.labels.foreground_labels) if cascade else 0)
        median = tuple(max(1, round(size)) for size in settings.median_image_size_in_voxels)
        dims = len(settings.patch_size)
        # As nnU-Net has it: the whole volumes, for 2d too.
        full = base["configurations"].get(FULL)
        depth = full["median_image_size_in_voxels"][0] if full and dims == 2 else 1
        voxels = math.prod(median) * depth * max(1, len(self.dataset))

        def largest_batch(patch_voxels: int) -> int:
            share = round(voxels * self.max_dataset_covered / patch_voxels)
            return max(self.UNet_min_batch_size, min(share, settings.batch_size))

        task = Task(
            median_shape=median[-dims:],
            channels=channels,
            classes=classes,
            queries=lambda backbone: num_queries(count.most, backbone),
            targets_per_slice=count.most,
            regions=self.labels.has_regions,
            largest_batch=largest_batch,
        )
        if self.request.preset is not None:
            return _preset_sizes(self.request.preset, task, self.gpu_memory_gb)
        return choose_sizes(task, self.request.backbones, self.gpu_memory_gb, self.notify)


class _InMemory(ExperimentPlanner):
    """nnU-Net's own planner, but for the file that it writes."""

    def save_plans(self, plans: dict[str, Any]) -> None:
        recursive_fix_for_json_export(plans)


def _with_parents(names: Sequence[str]) -> set[str]:
    """A cascade needs both configurations that it is made of."""
    return {*names, FULL, LOW} if CASCADE in names else set(names)


def _preset_sizes(preset: Preset, task: Task, gpu_memory_gb: float) -> Sizes:
    """The published setting, whatever memory it takes; only checkpointing, which changes no number, is chosen."""
    config = MaskSAMConfig(
        preset.backbone,
        preset.patch_size,
        preset.upsample,
        preset.num_queries,
        regions=False,
        stem_width=SAM_PROFILE.stem_width,
        generator_widths=SAM_PROFILE.generator_widths,
        head_width=SAM_PROFILE.head_width,
        loss=preset.loss,
    )
    inputs = (task.channels, task.classes, preset.batch_size, task.targets_per_slice)
    cost = training_cost(config, *inputs)
    without = cost.peak_gib
    if without > gpu_memory_gb * USABLE:
        config = replace(config, checkpointing=True)
        cost = training_cost(config, *inputs)
    source = f"--preset {preset.name}: {{}}"
    reasons = {
        "backbone": source.format(preset.sources["backbone"]),
        "D": source.format(preset.sources["patch_size"]),
        "H x W": source.format(preset.sources["patch_size"]),
        "u": source.format(preset.sources["upsample"]),
        "N": source.format(preset.sources["num_queries"]),
        "batch size": source.format(preset.sources["batch_size"]),
        "checkpointing": f"without it {without:.1f} GiB" if config.checkpointing else "not needed for this memory",
    }
    if cost.peak_gib > gpu_memory_gb * USABLE:
        reasons["memory"] = f"more than --gpu-memory {gpu_memory_gb:g} leaves; the published setting was kept"
    return Sizes(config, preset.batch_size, cost, reasons)


def _decisions(sizes: Sizes, count: SliceCount) -> list[dict[str, Any]]:
    """Rows of what was decided and why, as plain JSON."""
    config, cost, why = sizes.config, sizes.cost, sizes.reasons
    *depth, height, width = config.patch_size
    queries = f"up to {count.most} targets in a slice ({count.case}, slice {count.slice}), and headroom"
    hours = 250_000 * cost.tflop / 100 / 3600
    rows: list[tuple[str, Any, str]] = [("backbone", config.backbone, why["backbone"])]
    if depth:
        rows.append(("D", depth[0], why["D"]))
    rows += [
        ("H x W", f"{height} x {width}", why["H x W"]),
        ("u", config.upsample, f"{why['u']}: {config.upsample * height} x {config.upsample * width}"),
        ("N", config.num_queries, why.get("N", queries)),
        ("batch size", sizes.batch_size, why["batch size"]),
        ("checkpointing", "on" if config.checkpointing else "off", why["checkpointing"]),
        ("memory", f"{cost.peak_gib:.1f} GiB", why.get("memory", "estimated, bfloat16, for a training step")),
        ("operations", f"{cost.tflop:.3g} TFLOP", f"a step; 250 000 at 100 TFLOP/s take {hours:.3g} hours"),
    ]
    return [{"what": what, "value": value, "why": reason} for what, value, reason in rows]
