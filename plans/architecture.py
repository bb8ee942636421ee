"""Read and write the MaskSAM config in nnU-Net's plans, inside a configuration's ``architecture``."""

from __future__ import annotations

import os
from typing import Any

from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.config import ConfigError, MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER

BASE_PLANS = "nnUNetPlans"
"""nnU-Net's own plans, whose preprocessed data MaskSAM's plans share."""
NETWORK_CLASS = "masksam_nnunet.modeling.MaskSAM"
DECISIONS = "masksam"
"""The key of plans under which ``masksam plan`` keeps what it decided; nnU-Net leaves it alone."""
_CONFIG_KEY = "config"
_READ = ("patch_size", "batch_size", "spacing", "normalization_schemes", "data_identifier", "architecture")


def read_config(configuration: ConfigurationManager) -> MaskSAMConfig | None:
    """The MaskSAM config of a configuration; None where plans hold another network.

    Raises:
        ConfigError: where the config is broken.
    """
    if configuration.network_arch_class_name != NETWORK_CLASS:
        return None
    kwargs = configuration.configuration["architecture"].get("arch_kwargs")
    if not isinstance(kwargs, dict) or _CONFIG_KEY not in kwargs:
        found = sorted(kwargs) if isinstance(kwargs, dict) else kwargs
        raise ConfigError(
            f"plans name {NETWORK_CLASS} but hold no {_CONFIG_KEY!r} in arch_kwargs: {found}. Plan again."
        )
    content = kwargs[_CONFIG_KEY]
    # A list, as what JSON holds need not be hashable.
    if isinstance(content, dict) and content.get("backbone") not in list(BACKBONES):
        _import_trainers()
    return MaskSAMConfig.from_json(content)


def _import_trainers() -> None:
    """All modules of the folders that nnU-Net searches for trainers: they may register the backbone in question.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for folder in filter(os.path.isdir, os.environ.get(EXT_TRAINER, "").split(os.pathsep)):
        try:  # no class has an empty name, so nnU-Net's search sees them all
            recursive_find_python_class(folder, "", None, base_folder=folder, cleanup_imports_from_base_folder=True)
        except Exception as error:
            raise ConfigError(
                f"{EXT_TRAINER}: a module in {folder} cannot be imported ({type(error).__name__}: {error})"
            ) from error


def open_configuration(plans: Any, name: str) -> tuple[ConfigurationManager, MaskSAMConfig | None]:
    """A configuration of plans from a file, as nnU-Net resolves it, and its MaskSAM config; None for another network.

    Raises:
        ConfigError: the plans are damaged, have no such configuration, are of another version, or cannot be read
            by nnU-Net.
    """
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise ConfigError("there are no configurations in these plans: they are damaged, or no plans. Plan again.")
    if name not in plans["configurations"]:
        raise ConfigError(f"these plans have no configuration {name!r}, but {sorted(plans['configurations'])}.")
    try:
        configuration = PlansManager(plans).get_configuration(name)
        lacking = [key for key in _READ if key not in configuration.configuration]
        architecture = configuration.configuration.get("architecture")
        if lacking or not isinstance(architecture, dict) or not isinstance(architecture.get("network_class_name"), str):
            raise LookupError(f"it lacks {', '.join(lacking) or 'a network_class_name'}")
    except Exception as error:  # nnU-Net does not validate plans, and fails on damaged ones in many ways
        raise ConfigError(
            f"configuration {name!r} of these plans cannot be used ({type(error).__name__}: {error}): they are damaged "
            "or of another version of nnU-Net. Plan again."
        ) from error
    return configuration, read_config(configuration)


def write_config(plans: dict[str, Any], configuration_name: str, config: MaskSAMConfig) -> None:
    """Put a config into plans, in place, beside what nnU-Net needs there."""
    # A manager of its own: nnU-Net caches and copies configurations.
    resolved = PlansManager(plans)._internal_resolve_configuration_inheritance(configuration_name)
    before = ConfigurationManager(resolved)
    plans["configurations"][configuration_name]["architecture"] = {
        "network_class_name": NETWORK_CLASS,
        "arch_kwargs": {_CONFIG_KEY: config.to_json(), "strides": before.pool_op_kernel_sizes},
        "_kw_requires_import": [],
    }
