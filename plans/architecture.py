"""Where a MaskSAM config stands in nnU-Net's plans: inside the configuration's ``architecture``."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.config import ConfigError, MaskSAMConfig

BASE_PLANS = "nnUNetPlans"
"""nnU-Net's own plans, whose preprocessed data MaskSAM's plans share."""
NETWORK_CLASS = "masksam_nnunet.modeling.MaskSAM"
DECISIONS = "masksam"
"""The key of plans under which ``masksam plan`` keeps what it decided; nnU-Net leaves it alone."""
_CONFIG_KEY = "config"


def read_config(configuration: ConfigurationManager) -> MaskSAMConfig | None:
    """The MaskSAM config of a configuration; None where plans hold another network.

    Raises:
        ConfigError: where the config is broken.
    """
    if configuration.network_arch_class_name != NETWORK_CLASS:
        return None
    kwargs = configuration.network_arch_init_kwargs
    if _CONFIG_KEY not in kwargs:
        raise ConfigError(
            f"plans name {NETWORK_CLASS} but hold no {_CONFIG_KEY!r} in arch_kwargs: {sorted(kwargs)}. Plan again."
        )
    return MaskSAMConfig.from_json(kwargs[_CONFIG_KEY])


def write_config(plans: dict[str, Any], configuration_name: str, config: MaskSAMConfig) -> None:
    """Put a config into plans, in place, beside what nnU-Net needs there."""
    # An own, parent-less manager: nnU-Net caches and copies configurations.
    resolved = PlansManager(plans)._internal_resolve_configuration_inheritance(configuration_name)
    before = ConfigurationManager(resolved)
    plans["configurations"][configuration_name]["architecture"] = {
        "network_class_name": NETWORK_CLASS,
        "arch_kwargs": {_CONFIG_KEY: config.to_json(), "strides": before.pool_op_kernel_sizes},
        "_kw_requires_import": [],
    }
