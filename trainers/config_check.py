"""Which config a training has, and whether the results folder agrees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.plans.architecture import BASE_PLANS, DECISIONS, read_config, write_config
from masksam_nnunet.plans.derive import derive_config

DEFAULT_BACKBONE = "vit_b"
_DATA_SETTINGS = ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "preprocessor_name")


def check_preset(plans: dict[str, Any], configuration: str, preset: str | None, trainer_name: str) -> None:
    """A trainer that repeats a published setting must be given the plans that hold it.

    Raises:
        ConfigError: otherwise.
    """
    there = plans.get(DECISIONS, {}).get(configuration, {}).get("preset")
    if preset is not None and there != preset:
        held = "none" if there is None else repr(there)
        raise ConfigError(
            f"{trainer_name} repeats the published setting {preset!r}, but {configuration} of the plans "
            f"{plans['plans_name']!r} holds {held}. Run masksam plan with --preset {preset} and train with its plans "
            "(-p), or use MaskSAMTrainer."
        )


def resolve_config(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], backbone: str | None, trainer_name: str
) -> MaskSAMConfig:
    """The config that plans hold, or that is derived from plain plans, which then hold it.

    ``backbone`` is the trainer's own; None takes the plans', or the default on plain plans.

    Raises:
        ConfigError: where plans name another backbone than the trainer, or do not fit themselves or the dataset.
    """
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    config = read_config(settings)
    if config is None:
        config = derive_config(plans, configuration, dataset_json, backbone or DEFAULT_BACKBONE)
        write_config(plans, configuration, config)
        return config
    where = f"plans {plans['plans_name']!r}, configuration {configuration!r}"
    if backbone is not None and config.backbone != backbone:
        raise ConfigError(
            f"{where}: backbone = {config.backbone!r}, but {trainer_name} trains {backbone!r}. "
            "Use MaskSAMTrainer, which trains what plans name, or other plans (-p)."
        )
    patch_size = tuple(settings.patch_size)
    if config.patch_size != patch_size:
        raise ConfigError(
            f"{where}: patch_size = {patch_size}, but the MaskSAM config beside it is for {config.patch_size}. "
            "Set both, or plan again."
        )
    regions = manager.get_label_manager(dataset_json).has_regions
    if config.regions != regions:
        raise ConfigError(
            f"{where}: the MaskSAM config says regions = {config.regions}, but the dataset's labels say {regions}. "
            "Plans move between datasets of one kind only: plan this dataset itself."
        )
    return config


def check_shared_data(plans: dict[str, Any], configuration: str) -> None:
    """MaskSAM's plans use the data preprocessed for nnU-Net, whose settings must still equal the plans' own.

    It does not after ``nnUNetv2_move_plans_between_datasets`` without ``-tp``, or after a new planning of nnU-Net.

    Raises:
        ConfigError: naming what differs.
    """
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if plans["plans_name"] == BASE_PLANS or not preprocessed:
        return
    file = Path(preprocessed) / plans["dataset_name"] / f"{BASE_PLANS}.json"
    if not settings.data_identifier.startswith(f"{BASE_PLANS}_") or not file.is_file():
        return
    base = PlansManager(str(file))
    owner = next(
        (
            c
            for c in base.available_configurations
            if base.get_configuration(c).data_identifier == settings.data_identifier
        ),
        None,
    )
    if owner is None:
        return
    theirs, ours = base.get_configuration(owner).configuration, settings.configuration
    different = [name for name in _DATA_SETTINGS if theirs.get(name) != ours.get(name)]
    shared = ("transpose_forward", "foreground_intensity_properties_per_channel")
    # As text: NaN, where no case has foreground, equals itself there.
    different += [name for name in shared if json.dumps(base.plans.get(name)) != json.dumps(plans.get(name))]
    if different:
        raise ConfigError(
            f"plans {plans['plans_name']!r}, configuration {configuration!r}: {', '.join(different)} differ from those "
            f"of {file}, whose data ({settings.data_identifier}) would be used. Run masksam plan again; or "
            "move plans between datasets with a name of their own (-tp) and preprocess with them."
        )


def check_results_folder(
    plans: dict[str, Any], configuration: str, fold: int | str, config: MaskSAMConfig, trainer_name: str
) -> None:
    """All folds of a results folder share one plans.json, so they must share the config.

    Raises:
        ConfigError: if trained folds there have another one.
    """
    results = os.environ.get("nnUNet_results")
    if not results:
        return
    folder = Path(results) / plans["dataset_name"] / f"{trainer_name}__{plans['plans_name']}__{configuration}"
    file = folder / "plans.json"
    other_folds = any(f.name != f"fold_{fold}" for f in folder.glob("fold_*"))
    started = other_folds or any(folder.glob("fold_*/checkpoint_*.pth"))
    if not file.is_file() or not started:
        return
    there = read_config(PlansManager(json.loads(file.read_text())).get_configuration(configuration))
    if there != config:
        theirs, ours = ({} if c is None else c.to_json() for c in (there, config))
        names = [k for k in ours if theirs.get(k) != ours[k]]
        changes = ", ".join(f"{k}: {theirs.get(k)!r} there, {ours[k]!r} now" for k in names)
        raise ConfigError(
            f"the results folder {folder} holds folds trained with another MaskSAM config ({changes}). "
            "All folds share its plans.json. Continue with the plans that those folds were trained with, or move the "
            "folder away, or plan under another name."
        )
