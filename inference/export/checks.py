"""Whether plans and ``dataset.json`` from elsewhere are what nnU-Net predicts with, and name nothing but its parts.

nnU-Net finds classes and functions by the names in its plans, imports what they name and calls it. Of models from
elsewhere only parts of nnU-Net, of its network library, of PyTorch and of this package are taken.
"""

from __future__ import annotations

import inspect
import math
import pydoc
import re
from collections.abc import Callable, Mapping, Sequence
from os.path import join
from typing import Any

import nnunetv2
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from masksam_nnunet.errors import PortableError
from masksam_nnunet.plans.architecture import NETWORK_CLASS, read_config

from .description import DATASET, PLANS, Description

LARGEST_AXIS, LARGEST_PATCH = 4096, 2**28
"""Voxels."""
MOST_PARTS = 100
"""Of a network: stages, or blocks in one. Legitimate ones have ten."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
_ENDING = re.compile(r"(\.[A-Za-z0-9]{1,10}){1,3}")
_NETWORKS = ("dynamic_network_architectures.architectures.",)
_PARTS_OF_NETWORKS = ("torch.nn.", "dynamic_network_architectures.building_blocks.")
_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")


def check_model(description: Description, plans: Any, dataset_json: Any) -> PlansManager:
    """Plans that are safe to be used as ``description`` says.

    Args:
        description: the model's.
        plans: the content of its plans.json.
        dataset_json: the content of its dataset.json.

    Raises:
        PortableError: what is wrong, and where.
    """
    _check(isinstance(plans, dict), f"{PLANS} is not an object")
    _check(isinstance(dataset_json, dict), f"{DATASET} is not an object")
    for key, expected in (("dataset_name", description.dataset), ("plans_name", description.plans)):
        _check(plans.get(key) == expected, f"{PLANS}: {key} = {plans.get(key)!r:.80}, model.json says {expected}")
    _check_orientation(plans)
    channels = _check_dataset(dataset_json)
    reader = _part(plans, "image_reader_writer", "imageio", BaseReaderWriter)
    ending = dataset_json.get("file_ending")
    _check(
        isinstance(ending, str) and bool(_ENDING.fullmatch(ending)) and ending in reader.supported_file_endings,
        f"{DATASET}: file_ending = {ending!r:.80} is none that {reader.__name__} has",
    )
    if "label_manager" in plans:
        _part(plans, "label_manager", "utilities.label_handling", LabelManager)
    configurations = plans.get("configurations")
    _check(
        isinstance(configurations, dict) and all(isinstance(value, dict) for value in configurations.values()),
        f"{PLANS}: configurations is not an object of objects",
    )
    manager = PlansManager(plans)
    try:
        configuration = manager.get_configuration(description.configuration)
    except Exception as error:  # inheritance that is missing or circular, or an architecture of old plans that is not
        raise PortableError(f"{PLANS}: no configuration {description.configuration}: {_short(error)}") from error
    _check_configuration(configuration, channels)
    _check_intensities(plans, configuration.normalization_schemes)
    _check_architecture(configuration, description)
    try:
        manager.get_label_manager(dataset_json)
    except Exception as error:  # nnU-Net's own checks
        raise PortableError(f"{DATASET}: labels: {_short(error)}") from error
    return manager


def _check_orientation(plans: Mapping[str, Any]) -> None:
    forward: Any = plans.get("transpose_forward")
    backward: Any = plans.get("transpose_backward")
    orders = [order for order in (forward, backward) if _all(order, 3, _is_whole) and sorted(order) == [0, 1, 2]]
    _check(
        len(orders) == 2 and [orders[0][axis] for axis in orders[1]] == [0, 1, 2],
        f"{PLANS}: transpose_forward = {forward!r:.40} and transpose_backward = {backward!r:.40} are not two orders of "
        "0, 1, 2 of which one undoes the other",
    )


def _check_dataset(dataset_json: Mapping[str, Any]) -> int:
    """Checks labels and channels; the number of channels."""
    labels = dataset_json.get("labels")
    values = (
        [v for item in labels.values() for v in (item if isinstance(item, list) else [item])]
        if isinstance(labels, dict)
        else []
    )
    _check(
        bool(values) and len(values) < 2**16 and all(_is_whole(v) and 0 <= v < 2**16 for v in values),
        f"{DATASET}: labels = {labels!r:.80} is not an object of labels, each from 0 to 65535, or lists of them",
    )
    order = dataset_json.get("regions_class_order")
    _check(
        order is None or _all(order, None, lambda v: _is_whole(v) and 0 <= v < 2**16),
        f"{DATASET}: regions_class_order = {order!r:.80} is not a list of labels",
    )
    key = "modality" if "modality" in dataset_json else "channel_names"
    names: Any = dataset_json.get(key)
    _check(isinstance(names, dict) and 0 < len(names) < 1000, f"{DATASET}: {key} = {names!r:.80} names no channels")
    return len(names)


def _check_configuration(configuration: ConfigurationManager, channels: int) -> None:
    values = configuration.configuration
    patch: Any = values.get("patch_size")
    spacing = values.get("spacing")
    _check(
        isinstance(patch, list)
        and len(patch) in (2, 3)
        and all(_is_whole(size) and 0 < size <= LARGEST_AXIS for size in patch)
        and math.prod(patch) <= LARGEST_PATCH,
        f"{PLANS}: patch_size = {patch!r:.80} is not two or three sizes up to {LARGEST_AXIS}",
    )
    _check(
        _all(spacing, len(patch), lambda v: _is_number(v) and v > 0),
        f"{PLANS}: spacing = {spacing!r:.80} is not {len(patch)} positive numbers",
    )
    schemes: Any = values.get("normalization_schemes")
    masked = values.get("use_mask_for_norm")
    _check(
        _all(schemes, channels, lambda v: isinstance(v, str)) and _all(masked, channels, lambda v: isinstance(v, bool)),
        f"{PLANS}: normalization_schemes and use_mask_for_norm do not have {channels} entries, one for each channel",
    )
    for scheme in set(schemes):
        _part(
            {"normalization_schemes": scheme},
            "normalization_schemes",
            "preprocessing.normalization",
            ImageNormalization,
        )
    _part(values, "preprocessor_name", "preprocessing", DefaultPreprocessor)
    for kind in ("data", "seg", "probabilities"):
        _check_resampling(values, f"resampling_fn_{kind}")
    previous = values.get("previous_stage")
    _check(previous is None or isinstance(previous, str), f"{PLANS}: previous_stage = {previous!r:.80} is no name")


def _check_resampling(values: Mapping[str, Any], key: str) -> None:
    function = _found(values, key, "preprocessing.resampling")
    arguments: Any = values.get(f"{key}_kwargs")
    known = inspect.isfunction(function) and function.__module__.startswith("nnunetv2.preprocessing.resampling.")
    _check(known, f"{PLANS}: {key} = {values.get(key)!r:.80} is no resampling of nnU-Net's")
    _check(
        isinstance(arguments, dict)
        and all(value is None or isinstance(value, bool | int | float | str) for value in arguments.values()),
        f"{PLANS}: {key}_kwargs is not an object of plain values",
    )
    try:
        inspect.signature(function).bind(None, None, None, None, **arguments)
    except TypeError as error:
        raise PortableError(f"{PLANS}: {key}_kwargs: {error}") from error


def _check_intensities(plans: Mapping[str, Any], schemes: Sequence[str]) -> None:
    key = "foreground_intensity_properties_per_channel"
    by_channel = plans.get(key, plans.get("foreground_intensity_properties_by_modality"))
    for channel, scheme in enumerate(schemes):
        values = by_channel.get(str(channel)) if isinstance(by_channel, dict) else None
        needed = _INTENSITIES if scheme == "CTNormalization" else ()
        _check(
            isinstance(values, dict) and all(_is_number(values.get(name)) for name in needed),
            f"{PLANS}: {key} lacks those of channel {channel}, or {', '.join(_INTENSITIES)} for CTNormalization",
        )


def _check_architecture(configuration: ConfigurationManager, description: Description) -> None:
    """The network is a known one, of a size that can be built to be compared with the weights."""
    architecture = configuration.configuration.get("architecture")
    where = f"{PLANS}: architecture"
    _check(
        isinstance(architecture, dict)
        and isinstance(architecture.get("arch_kwargs"), dict)
        and _all(architecture.get("_kw_requires_import"), None, lambda v: isinstance(v, str)),
        f"{where} is not a class, its arguments, and those to import",
    )
    assert isinstance(architecture, dict)
    _check(architecture == description.network, f"{where} is not the network that model.json describes")
    name, arguments = architecture.get("network_class_name"), architecture["arch_kwargs"]
    if name == NETWORK_CLASS:
        try:
            read_config(configuration)
        except ValueError as error:
            raise PortableError(f"{where}: {error}") from error
    else:
        _check(_is_module(name, _NETWORKS), f"{where}: {name!r:.80} is no network of nnU-Net's or MaskSAM's")
    for key in architecture["_kw_requires_import"]:
        value = arguments.get(key)
        _check(
            key in arguments and (value is None or _is_module(value, _PARTS_OF_NETWORKS)),
            f"{where}: {key} = {value!r:.80} is no part of a network of PyTorch's or nnU-Net's",
        )
    for key, value in arguments.items():
        many = value if isinstance(value, list) else [value]
        _check(
            len(many) <= MOST_PARTS
            and not (key.startswith("n_") and any(_is_number(v) and v > MOST_PARTS for v in many)),
            f"{where}: {key} = {value!r:.80}, more than {MOST_PARTS}",
        )


def _is_module(name: Any, prefixes: tuple[str, ...]) -> bool:
    """Whether ``name`` is the address of a class of network modules below one of ``prefixes``."""
    if not (isinstance(name, str) and name.startswith(prefixes) and all(map(_IDENTIFIER.fullmatch, name.split(".")))):
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return False
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _part(values: Mapping[str, Any], key: str, folder: str, kind: type) -> Any:
    """nnU-Net's own class of this ``kind`` that a value of the plans names."""
    found = _found(values, key, folder)
    _check(
        inspect.isclass(found) and issubclass(found, kind) and found.__module__.startswith("nnunetv2."),
        f"{PLANS}: {key} = {values.get(key)!r:.80} is no {kind.__name__} of nnU-Net's",
    )
    return found


def _found(values: Mapping[str, Any], key: str, folder: str) -> Any:
    """What nnU-Net finds under the name that a value of the plans is."""
    name = values.get(key)
    if not (isinstance(name, str) and _IDENTIFIER.fullmatch(name)):
        return None
    return recursive_find_python_class(
        join(nnunetv2.__path__[0], *folder.split(".")), name, current_module=f"nnunetv2.{folder}"
    )


def _all(value: Any, length: int | None, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(valid, value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # not NaN either


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise PortableError(message)
