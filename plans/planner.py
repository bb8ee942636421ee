"""nnU-Net's planner with a MaskSAM network; spacing, normalization, resampling and data stay nnU-Net's."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet import __version__
from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_text_atomically

from .architecture import BASE_PLANS, DECISIONS, num_queries, write_config
from .presets import Preset
from .raw_check import TargetCount, count_targets
from .raw_data import RawDataset, number_of, read_raw_dataset
from .sizing import LARGEST_FIRST, Requirements, Sizes, choose_sizes, preset_sizes

CASCADE, FULL, LOW = "3d_cascade_fullres", "3d_fullres", "3d_lowres"


class MaskSAMPlanner(ExperimentPlanner):
    """Plans with a MaskSAM network in each configuration.

    Spacing, normalization, resampling and the identifier of the preprocessed data come from ``nnUNetPlans.json`` where
    it exists, so that both methods train on the same files. Else nnU-Net's planner makes them.

    nnU-Net looks for planners in its own folders only, so ``masksam plan`` is the command for this one.

    Args:
        dataset_name_or_id: as nnU-Net takes it.
        gpu_memory_target_in_gb: memory of the card to train on.
        preprocessor_name: nnU-Net's.
        plans_name: name of the plans file to write.
        overwrite_target_spacing: spacing of 3d_fullres; such plans have preprocessed data of their own.
        suppress_transpose: nnU-Net's.
        backbones: to be tried in this order.
        configurations: to plan; all that nnU-Net has if empty.
        preset: a published setting, or None.
        notify: receives a description of what is being tried.
        raw: the raw dataset, if it is read already.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "MaskSAMPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        backbones: tuple[str, ...] = LARGEST_FIRST,
        configurations: Sequence[str] = (),
        preset: Preset | None = None,
        notify: Callable[[str], None] = lambda _: None,
        raw: RawDataset | None = None,
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
        self.backbones, self.wanted, self.preset = backbones, tuple(configurations), preset
        self.notify = notify
        self.raw = raw or read_raw_dataset(Path(self.raw_dataset_folder), "-d", min_cases=1)
        self.planned: list[str] = []
        """The configurations of the last call, in nnU-Net's order."""
        self.labels = LabelManager(dict(self.dataset_json["labels"]), self.dataset_json.get("regions_class_order"))
        self.channels = len(self.dataset_json["channel_names"])
        self._shares_data = overwrite_target_spacing is None and not suppress_transpose

    @property
    def folder(self) -> Path:
        """The dataset's preprocessed folder."""
        return Path(nnUNet_preprocessed) / self.dataset_name

    @property
    def file(self) -> Path:
        """The plans to write."""
        return self.folder / f"{self.plans_identifier}.json"

    def generate_data_identifier(self, configuration_name: str) -> str:
        """nnU-Net's own identifier, unless another spacing is forced."""
        return f"{BASE_PLANS if self._shares_data else self.plans_identifier}_{configuration_name}"

    def plan_experiment(self) -> dict[str, Any]:
        """Make the plans and save them atomically.

        Raises:
            DataError: nnU-Net has no such configuration, labels cannot be read or do not fit a preset, a plans file of
                that name is not this planner's, or memory is too small.
        """
        preset = self.preset
        if preset is not None:
            classes = self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
            preset.check_labels(len(classes), self.labels.has_regions, self.channels)
        earlier = self._earlier_plans()
        base = self._base_plans()
        names = self._configurations(base)
        self.notify("reading the training labels")
        count = count_targets(self.raw, base["transpose_forward"][0])

        self.planned = [name for name in base["configurations"] if name in _with_parents(names)]
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
            sizes = self._sizes(base, name, count, cascade=CASCADE in configurations and name == FULL)
            configurations[name]["patch_size"] = list(sizes.config.patch_size)
            configurations[name]["batch_size"] = sizes.batch_size
            write_config(plans, name, sizes.config)
            decisions[name] = {
                "version": __version__,
                "gpu_memory_gb": self.gpu_memory_gb,
                "preset": preset and preset.name,
                "targets_per_slice": asdict(count),
                "decided": sizes.table(preset.epochs if preset else 1000),
            }
            if preset is not None:
                decisions[name] |= {"notes": list(preset.notes), "sources": preset.sources}
        if CASCADE not in configurations:  # nnU-Net would look for it after a validation of 3d_lowres
            configurations.get(LOW, {}).pop("next_stage", None)
        self.plans = plans
        self.save_plans(plans)
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans atomically."""
        recursive_fix_for_json_export(plans)
        # NaN is what nnU-Net writes where no case has foreground.
        text = json.dumps(plans, indent=4) + "\n"
        # Like nnU-Net's planner: preprocessing and training read dataset.json there.
        description = (Path(self.raw_dataset_folder) / "dataset.json").read_text(encoding="utf-8")
        write_text_atomically(self.folder / "dataset.json", description)
        write_text_atomically(self.file, text)

    def _earlier_plans(self) -> dict[str, Any]:
        """The plans in the file, whose other configurations are kept; empty where there is none."""
        if not self.file.is_file():
            return {}
        earlier = _read_plans(self.file, self.dataset_name, "remove it and plan again")
        if not isinstance(earlier.get(DECISIONS), dict):
            raise DataError(
                f"--plans-name {self.plans_identifier}: {self.file} was not written by masksam plan; choose "
                "another name"
            )
        return earlier

    def _base_plans(self) -> dict[str, Any]:
        file = self.folder / f"{BASE_PLANS}.json"
        if self._shares_data and file.is_file():
            remedy = f"remove it and run nnUNetv2_plan_experiment -d {number_of(self.dataset_name)}"
            return _read_plans(file, self.dataset_name, remedy)
        stock = _InMemoryPlanner(
            self.dataset_name,
            preprocessor_name=self.preprocessor_name,
            plans_name=BASE_PLANS if self._shares_data else self.plans_identifier,
            overwrite_target_spacing=self.overwrite_target_spacing,
            suppress_transpose=self.suppress_transpose,
        )
        with (
            contextlib.redirect_stdout(io.StringIO()),  # it prints U-Nets
            _left_as_it_was(self.folder / "dataset.json"),  # it writes the file, but planning may still fail
            _without_variable("nnUNet_n_proc_DA"),  # 0, right for training, makes planning fail
        ):
            return stock.plan_experiment()

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
        return wanted or available

    def _sizes(self, base: dict[str, Any], name: str, count: TargetCount, cascade: bool) -> Sizes:
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
            queries=lambda backbone: num_queries(count.most, backbone),
            targets_per_slice=count.most,
            where=f"{count.case}, slice {count.slice}",
            regions=self.labels.has_regions,
            largest_batch=largest_batch,
        )
        if self.preset is not None:
            return preset_sizes(self.preset, wanted, self.gpu_memory_gb)
        return choose_sizes(wanted, self.backbones, self.gpu_memory_gb, self.notify)


class _InMemoryPlanner(ExperimentPlanner):
    """nnU-Net's own planner, which writes no plans file."""

    def save_plans(self, plans: dict[str, Any]) -> None:
        recursive_fix_for_json_export(plans)


def _with_parents(names: Sequence[str]) -> set[str]:
    """A cascade needs both of its configurations."""
    return {*names, FULL, LOW} if CASCADE in names else set(names)


_SETTINGS = ("patch_size", "batch_size", "spacing", "median_image_size_in_voxels", "architecture", "data_identifier")


def _read_plans(file: Path, dataset: str, remedy: str) -> dict[str, Any]:
    """Plans of ``dataset``, with everything that planning reads.

    Raises:
        DataError: the file holds something else.
    """
    try:
        plans = read_json(file)
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}; {remedy}") from error
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(configurations, dict) or not configurations:
        raise DataError(f"{file} holds no plans; {remedy}")
    if plans.get("dataset_name") != dataset:
        raise DataError(
            f"{file} holds plans of {plans.get('dataset_name')!r}; move them with "
            f"nnUNetv2_move_plans_between_datasets, or {remedy}"
        )
    for name, settings in configurations.items():
        missing = [key for key in _SETTINGS if not isinstance(settings, dict) or key not in settings]
        if missing and not (isinstance(settings, dict) and settings.get("inherits_from") in configurations):
            raise DataError(f"{file} is damaged or of another version: {name} has no {', '.join(missing)}; {remedy}")
    result: dict[str, Any] = plans
    return result


@contextlib.contextmanager
def _left_as_it_was(file: Path) -> Iterator[None]:
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(before)


@contextlib.contextmanager
def _without_variable(name: str) -> Iterator[None]:
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
