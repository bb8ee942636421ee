"""The networks that nnU-Net builds to predict."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn


def network_to_predict(
    plans: PlansManager, configuration: str, dataset_json: Mapping[str, Any], trainer: str
) -> nn.Module:
    """What ``nnUNetPredictor.initialize_from_trained_model_folder`` builds; its weights are those of a new network.

    Args:
        plans: the model's own.
        configuration: its name in them.
        dataset_json: the model's own.
        trainer: the trainer's class, which is looked up as nnU-Net does.

    Raises:
        RuntimeError: there is no such trainer.
    """
    manager = plans.get_configuration(configuration)
    build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        described: tuple[Any, ...] = (plans, manager)
    else:  # trainers written for earlier versions of nnU-Net
        described = (
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
        )
    channels = determine_num_input_channels(plans, manager, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    return build(*described, channels, heads, enable_deep_supervision=False)
