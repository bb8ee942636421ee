"""What a training reads is checked before it starts: plans, MaskSAM's config in them, and preprocessed cases."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.errors import DataError
from masksam_nnunet.files import once_written, read_json
from masksam_nnunet.method import MASKSAM

from .architecture import BASE_PLANS, DECISIONS, config_of_method, derive_config, read_config, write_config

_DATA_SETTINGS = ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "preprocessor_name")


def require_configuration(folder: Path, plans: str, configuration: str, number: int, who: str) -> ConfigurationManager:
    """A configuration of the plans in a dataset's preprocessed ``folder``; messages start with ``who``.

    Raises:
        DataError: the plans, or dataset.json beside them, are missing or damaged, or have no such configuration.
    """
    file = folder / f"{plans}.json"
    command = planning_command(plans, number)
    if not file.is_file():
        others = ", ".join(sorted(path.stem for path in folder.glob("*Plans*.json"))) or "none"
        raise DataError(f"{who}: {file} is missing; name other plans, of which there are: {others}. Or: {command}")
    if not (folder / "dataset.json").is_file():
        raise DataError(f"{who}: {folder / 'dataset.json'} is missing; make it with: {command}")
    try:
        content = read_json(file)
        configurations = list(content["configurations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error!r}); make it again with: {command}") from error
    if configuration not in configurations:
        raise DataError(f"-c {configuration}: {file} has no such configuration, but {', '.join(configurations)}")
    return PlansManager(content).get_configuration(configuration)


def require_cases(
    folder: Path, plans: str, configuration: str, data: str, number: int, who: str, cases: Sequence[str] = ()
) -> list[str]:
    """The preprocessed cases in ``folder / data``: at least one, and all of ``cases``, else a DataError."""
    present = preprocessed_cases(folder / data)
    missing = sorted(set(cases) - set(present))
    if missing or not present:
        found = f"lacks {len(missing)} of {len(cases)} cases, such as {missing[0]}" if missing else "holds no case"
        raise DataError(
            f"{who}: {folder / data} {found}; preprocess them with: nnUNetv2_preprocess -d {number} "
            f"-plans_name {plans} -c {configuration}"
        )
    return present


def preprocessed_cases(folder: Path) -> list[str]:
    """The cases in a folder of preprocessed data; none where it is missing or empty."""
    try:
        return list(infer_dataset_class(str(folder)).get_identifiers(str(folder))) if folder.is_dir() else []
    except (AssertionError, KeyError):  # an empty folder, or one of several kinds of files
        return []


def planning_command(plans: str, number: int) -> str:
    """The command that makes plans of this name for a dataset."""
    if plans == BASE_PLANS:
        return f"nnUNetv2_plan_and_preprocess -d {number}"
    if size := re.fullmatch("nnUNetResEncUNet(M|L|XL)Plans", plans):
        return f"nnUNetv2_plan_experiment -d {number} -pl nnUNetPlannerResEnc{size[1]}"
    return f"masksam plan -d {number} --plans-name {plans}"


def training_config(
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: dict[str, Any],
    trainer: str,
    backbone: str | None = None,
    preset: str | None = None,
    method: str = MASKSAM,
) -> MaskSAMConfig:
    """The config that plans hold, or that is derived from plain plans, which then hold it.

    ``plans`` are changed in place where the config is derived. ``backbone`` is what the trainer trains: None takes the
    plans', or the default on plain plans. ``preset`` is the published setting that the trainer belongs to. ``method``
    is the trainer's: plans are of MaskSAM, and what another method does not share with it is changed in them.

    Raises:
        ConfigError: plans, trainer, dataset, preprocessed data and earlier folds do not fit each other.
    """
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    where = f"plans {plans['plans_name']!r}, configuration {configuration!r}"
    config = read_config(settings)
    residual = settings.network_arch_class_name.endswith("ResidualEncoderUNet")
    if config is None:
        config = derive_config(plans, configuration, dataset_json, backbone or "vit_b")
        write_config(plans, configuration, config)
    if method != config.method:
        config = config_of_method(config, method, settings.spacing, residual)
        write_config(plans, configuration, config)
    if backbone not in (None, config.backbone):
        raise ConfigError(
            f"{where}: backbone = {config.backbone!r}, but {trainer} trains {backbone!r}. Use MaskSAMTrainer, or other "
            "plans (-p)."
        )
    if config.patch_size != tuple(settings.patch_size):
        raise ConfigError(
            f"{where}: patch_size = {settings.patch_size}, but the MaskSAM config has {config.patch_size}. Plan again."
        )
    regions = manager.get_label_manager(dataset_json).has_regions
    if config.regions != regions:
        raise ConfigError(
            f"{where}: regions = {config.regions}, but the dataset's labels say {regions}. Plan this dataset itself."
        )
    planned_preset = plans.get(DECISIONS, {}).get(configuration, {}).get("preset")
    if preset not in (None, planned_preset):
        raise ConfigError(
            f"{where}: the preset is {planned_preset!r}, but {trainer} trains {preset!r}. Plan with --preset {preset}, "
            "or use MaskSAMTrainer."
        )
    _check_shared_data(plans, settings, where)
    _check_results_folder(plans, configuration, fold, config, trainer)
    return config


def _check_shared_data(plans: dict[str, Any], settings: ConfigurationManager, where: str) -> None:
    """MaskSAM's plans use the data preprocessed for nnU-Net, so settings of both plans must agree.

    They do not after ``nnUNetv2_move_plans_between_datasets`` without ``-tp``, or where nnU-Net was planned again.
    """
    file = Path(os.environ.get("nnUNet_preprocessed", "")) / plans["dataset_name"] / f"{BASE_PLANS}.json"
    if plans["plans_name"] == BASE_PLANS or not file.is_file():
        return
    base = PlansManager(str(file))
    configurations = map(base.get_configuration, base.available_configurations)
    owner = next((c for c in configurations if c.data_identifier == settings.data_identifier), None)
    if owner is None:
        return
    different = [name for name in _DATA_SETTINGS if owner.configuration.get(name) != settings.configuration.get(name)]
    shared = ("transpose_forward", "foreground_intensity_properties_per_channel")
    # As text: NaN, where no case has foreground, equals itself there.
    different += [name for name in shared if json.dumps(base.plans.get(name)) != json.dumps(plans.get(name))]
    if different:
        raise ConfigError(
            f"{where}: {', '.join(different)} differ from those of {file}, whose preprocessed data would be used. Run "
            "masksam plan again; or move plans under a name of their own (-tp) and preprocess with them."
        )


def _check_results_folder(
    plans: dict[str, Any], configuration: str, fold: int | str, config: MaskSAMConfig, trainer: str
) -> None:
    """All folds of a results folder share one plans.json, so they must share the config."""
    results = Path(os.environ.get("nnUNet_results", ""))
    folder = results / plans["dataset_name"] / f"{trainer}__{plans['plans_name']}__{configuration}"
    file = folder / "plans.json"
    other_folds = any(f.name != f"fold_{fold}" for f in folder.glob("fold_*"))
    started = other_folds or any(folder.glob("fold_*/checkpoint_*.pth"))
    if not file.is_file() or not started:
        return
    try:
        trained = read_config(PlansManager(once_written(lambda: read_json(file))).get_configuration(configuration))
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds folds whose plans cannot be used ({error}). Move the folder away, or plan under another "
            "name."
        ) from error
    if trained != config:
        theirs, ours = ({} if c is None else c.to_json() for c in (trained, config))
        names = [k for k in ours if theirs.get(k) != ours[k]]
        changes = ", ".join(f"{k}: {theirs.get(k)!r} there, {ours[k]!r} now" for k in names)
        raise ConfigError(
            f"{folder} holds folds trained with another MaskSAM config ({changes}). Train with their plans, move the "
            "folder away, or plan under another name."
        )
