"""Check that foreign plans and ``dataset.json`` are what nnU-Net predicts with, and name nothing but its parts.

nnU-Net finds classes and functions by the names in its plans, imports what they name and calls it. Of foreign models
only parts of nnU-Net, of its network library, of PyTorch and of this package are accepted.
"""

from __future__ import annotations

import inspect
import math
import pydoc
from os.path import join
from typing import Annotated, Any, TypeVar

import nnunetv2
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from masksam_nnunet.errors import ModelError, in_short
from masksam_nnunet.plans.architecture import NETWORK_CLASS, read_config

from .description import DATASET, PLANS, Description, fault

LARGEST_AXIS, LARGEST_PATCH = 4096, 2**28
"""Voxels."""
MOST_PARTS = 100
"""Of a network: stages, or blocks in one. Legitimate networks have ten."""

_NETWORKS = ("dynamic_network_architectures.architectures.",)
_PARTS_OF_NETWORKS = ("torch.nn.", "dynamic_network_architectures.building_blocks.")

Label = Annotated[int, Field(ge=0, lt=2**16)]
Number = Annotated[float, Field(gt=-1e30, lt=1e30)]  # neither NaN nor infinity
Order = Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(min_length=3, max_length=3)]
Arguments = dict[str, bool | int | float | str | None]
Parsed = TypeVar("Parsed", bound="_Foreign")


class _Foreign(BaseModel):
    """A part of nnU-Net's JSON files. Other keys than those that are read may be there."""

    model_config = ConfigDict(strict=True, extra="ignore", regex_engine="python-re")


class _Dataset(_Foreign):
    labels: Annotated[dict[str, Label | list[Label]], Field(min_length=1, max_length=2**16)]
    regions_class_order: list[Label] | None = None
    channel_names: Annotated[dict[str, Any], Field(min_length=1, max_length=999)] = Field(
        validation_alias=AliasChoices("modality", "channel_names")  # nnU-Net too prefers the older name
    )
    file_ending: Annotated[str, Field(pattern=r"\A(\.[A-Za-z0-9]{1,10}){1,3}\Z")]


class _Intensities(_Foreign):
    mean: Number
    std: Number
    percentile_00_5: Number
    percentile_99_5: Number


class _Plans(_Foreign):
    dataset_name: str
    plans_name: str
    transpose_forward: Order
    transpose_backward: Order
    image_reader_writer: str
    label_manager: str = "LabelManager"
    configurations: dict[str, dict[str, Any]]
    intensities: dict[str, dict[str, Any]] = Field(
        validation_alias=AliasChoices(
            "foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"
        )
    )

    @model_validator(mode="after")
    def _orders(self) -> _Plans:
        if [self.transpose_forward[axis] for axis in self.transpose_backward] != [0, 1, 2]:
            raise ValueError("transpose_backward does not undo transpose_forward")
        return self


class _Architecture(_Foreign):
    network_class_name: str
    arch_kwargs: dict[str, Any]
    imported: list[str] = Field(alias="_kw_requires_import")


class _Configuration(_Foreign):
    patch_size: Annotated[list[Annotated[int, Field(gt=0, le=LARGEST_AXIS)]], Field(min_length=2, max_length=3)]
    spacing: list[Annotated[float, Field(gt=0, lt=1e30)]]
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    preprocessor_name: str
    previous_stage: str | None = None
    architecture: _Architecture
    resampling_fn_data: str
    resampling_fn_data_kwargs: Arguments
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: Arguments
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: Arguments

    @model_validator(mode="after")
    def _sizes(self) -> _Configuration:
        if math.prod(self.patch_size) > LARGEST_PATCH:
            raise ValueError(f"patch_size = {self.patch_size} has more than {LARGEST_PATCH} voxels")
        if len(self.spacing) != len(self.patch_size):
            raise ValueError(f"spacing = {self.spacing} has not one value for each axis of patch_size")
        return self


def check_model(description: Description, plans: Any, dataset_json: Any) -> PlansManager:
    """Check the contents of plans.json and dataset.json, which may then be used as ``description`` says.

    Raises:
        ModelError: what is wrong, and where.
    """
    dataset, about = _parsed(_Dataset, dataset_json, DATASET), _parsed(_Plans, plans, PLANS)
    for key, expected in (("dataset_name", description.dataset), ("plans_name", description.plans)):
        _check(plans[key] == expected, f"{PLANS}: {key} = {plans[key]!r:.80}, but model.json says {expected}")
    reader = _part("image_reader_writer", about.image_reader_writer, "imageio", BaseReaderWriter)
    _part("label_manager", about.label_manager, "utilities.label_handling", LabelManager)
    known = dataset.file_ending in reader.supported_file_endings
    _check(known, f"{DATASET}: file_ending = {dataset.file_ending!r} is not one of {reader.__name__}'s")
    manager = PlansManager(plans)
    try:
        resolved = manager.get_configuration(description.configuration)
    except Exception as error:  # a missing or circular inheritance, or an odd architecture of old plans
        raise ModelError(f"{PLANS}: no configuration {description.configuration}: {in_short(error)}") from error
    configuration = _parsed(_Configuration, resolved.configuration, PLANS)
    _check_preprocessing(configuration, len(dataset.channel_names), about.intensities)
    same = resolved.configuration["architecture"] == description.network
    _check(same, f"{PLANS}: architecture is not the network that model.json describes")
    _check_architecture(configuration.architecture)
    try:
        if configuration.architecture.network_class_name == NETWORK_CLASS:
            read_config(resolved)
        manager.get_label_manager(dataset_json)
    except Exception as error:  # the config's checks, and nnU-Net's own
        raise ModelError(f"{PLANS} and {DATASET}: {in_short(error)}") from error
    return manager


def _parsed(kind: type[Parsed], content: Any, file: str) -> Parsed:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"{file}: {fault(error)}") from error


def _check_preprocessing(configuration: _Configuration, channels: int, intensities: dict[str, dict[str, Any]]) -> None:
    for key in ("normalization_schemes", "use_mask_for_norm"):
        found = len(getattr(configuration, key))
        _check(found == channels, f"{PLANS}: {key} has {found} entries for {channels} channels")
    where = "foreground_intensity_properties_per_channel"
    for channel, scheme in enumerate(configuration.normalization_schemes):
        _part("normalization_schemes", scheme, "preprocessing.normalization", ImageNormalization)
        _check(str(channel) in intensities, f"{PLANS}: {where} has no channel {channel}")
        if scheme == "CTNormalization":
            _parsed(_Intensities, intensities[str(channel)], f"{PLANS}: {where}")
    _part("preprocessor_name", configuration.preprocessor_name, "preprocessing", DefaultPreprocessor)
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        name = getattr(configuration, key)
        function = _found(name, "preprocessing.resampling")
        known = inspect.isfunction(function) and function.__module__.startswith("nnunetv2.preprocessing.resampling.")
        _check(known, f"{PLANS}: {key} = {name!r:.80} is not a resampling function of nnU-Net")
        try:
            inspect.signature(function).bind(None, None, None, None, **getattr(configuration, f"{key}_kwargs"))
        except TypeError as error:
            raise ModelError(f"{PLANS}: {key}_kwargs: {error}") from error


def _check_architecture(architecture: _Architecture) -> None:
    """Allow known networks only, of a size that can be built to be compared with the weights."""
    where, name, arguments = f"{PLANS}: architecture", architecture.network_class_name, architecture.arch_kwargs
    known = name == NETWORK_CLASS or _is_module(name, _NETWORKS)
    _check(known, f"{where}: {name!r:.80} is not a network of nnU-Net or MaskSAM")
    for key in architecture.imported:
        value = arguments.get(key)
        known = key in arguments and (value is None or _is_module(value, _PARTS_OF_NETWORKS))
        _check(known, f"{where}: {key} = {value!r:.80} is not a part of a network of PyTorch or nnU-Net")
    for key, value in arguments.items():
        many = value if isinstance(value, list) else [value]
        large = key.startswith("n_") and any(isinstance(v, int | float) and not v <= MOST_PARTS for v in many)
        _check(len(many) <= MOST_PARTS and not large, f"{where}: {key} = {value!r:.80}, more than {MOST_PARTS}")


def _is_module(name: Any, prefixes: tuple[str, ...]) -> bool:
    """Whether ``name`` is the address of a class of network modules below one of ``prefixes``."""
    if not (isinstance(name, str) and name.startswith(prefixes) and all(map(str.isidentifier, name.split(".")))):
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return False
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _part(key: str, name: str, folder: str, kind: type) -> Any:
    """nnU-Net's own class of this ``kind`` that a value of the plans names."""
    found = _found(name, folder)
    known = inspect.isclass(found) and issubclass(found, kind) and found.__module__.startswith("nnunetv2.")
    _check(known, f"{PLANS}: {key} = {name!r:.80} is not a {kind.__name__} of nnU-Net")
    return found


def _found(name: str, folder: str) -> Any:
    """What nnU-Net finds under a name in the plans."""
    place = join(nnunetv2.__path__[0], *folder.split("."))
    return recursive_find_python_class(place, name, current_module=f"nnunetv2.{folder}")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ModelError(message)
