"""Check that foreign plans and ``dataset.json`` are what nnU-Net predicts with, and name nothing but its parts.

nnU-Net finds classes and functions by the names in its plans, imports what they name and calls it. Of foreign models
only parts of nnU-Net, of its network library, of PyTorch and of this package are accepted.
"""

from __future__ import annotations

import inspect
import math
import pydoc
from os.path import join
from pathlib import Path
from typing import Annotated, Any

import nnunetv2
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
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


def _found(name: str, folder: str) -> Any:
    """What nnU-Net finds under a name in the plans."""
    place = join(nnunetv2.__path__[0], *folder.split("."))
    return recursive_find_python_class(place, name, current_module=f"nnunetv2.{folder}")


def _part(folder: str, kind: type) -> AfterValidator:
    """Accept the names of nnU-Net's own classes of this ``kind``."""

    def check(name: str) -> str:
        found = _found(name, folder)
        if not (inspect.isclass(found) and issubclass(found, kind) and found.__module__.startswith("nnunetv2.")):
            raise ValueError(f"it is not a {kind.__name__} of nnU-Net")
        return name

    return AfterValidator(check)


def _is_module(name: Any, prefixes: tuple[str, ...]) -> bool:
    """Whether ``name`` is the address of a class of network modules below one of ``prefixes``."""
    if not (isinstance(name, str) and name.startswith(prefixes) and all(map(str.isidentifier, name.split(".")))):
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return False
    return inspect.isclass(found) and issubclass(found, nn.Module)


Label = Annotated[int, Field(ge=0, lt=2**16)]
Number = Annotated[float, Field(gt=-1e30, lt=1e30)]  # neither NaN nor infinity
Scheme = Annotated[str, _part("preprocessing.normalization", ImageNormalization)]
Arguments = dict[str, bool | int | float | str | None]


class _Foreign(BaseModel):
    """A part of nnU-Net's JSON files. Other keys than those that are read may be there."""

    model_config = ConfigDict(strict=True, regex_engine="python-re")


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
    transpose_forward: list[int]
    transpose_backward: list[int]
    image_reader_writer: Annotated[str, _part("imageio", BaseReaderWriter)]
    label_manager: Annotated[str, _part("utilities.label_handling", LabelManager)] = "LabelManager"
    configurations: dict[str, dict[str, Any]]
    intensities: dict[str, dict[str, Any]] = Field(
        validation_alias=AliasChoices(
            "foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"
        )
    )

    @model_validator(mode="after")
    def _orders(self) -> _Plans:
        axes = [0, 1, 2]
        forward, backward = self.transpose_forward, self.transpose_backward
        if not sorted(forward) == sorted(backward) == axes or [forward[axis] for axis in backward] != axes:
            raise ValueError("transpose_backward does not undo transpose_forward")
        return self


class _Architecture(_Foreign):
    """Known networks only, of a size that can be built to be compared with the weights."""

    network_class_name: str
    arch_kwargs: dict[str, Any]
    imported: list[str] = Field(alias="_kw_requires_import")

    @model_validator(mode="after")
    def _is_known_and_small(self) -> _Architecture:
        if self.network_class_name != NETWORK_CLASS and not _is_module(self.network_class_name, _NETWORKS):
            raise ValueError(f"{self.network_class_name!r:.80} is not a network of nnU-Net or MaskSAM")
        for key in self.imported:
            value = self.arch_kwargs[key]
            if value is not None and not _is_module(value, _PARTS_OF_NETWORKS):
                raise ValueError(f"{key} = {value!r:.80} is not a part of a network of PyTorch or nnU-Net")
        for key, value in self.arch_kwargs.items():
            many = value if isinstance(value, list) else [value]
            large = key.startswith("n_") and any(isinstance(v, int | float) and not v <= MOST_PARTS for v in many)
            if len(many) > MOST_PARTS or large:
                raise ValueError(f"{key} = {value!r:.80}, more than {MOST_PARTS}")
        return self


class _Configuration(_Foreign):
    patch_size: Annotated[list[Annotated[int, Field(gt=0, le=LARGEST_AXIS)]], Field(min_length=2, max_length=3)]
    spacing: list[Annotated[float, Field(gt=0, lt=1e30)]]
    normalization_schemes: list[Scheme]
    use_mask_for_norm: list[bool]
    preprocessor_name: Annotated[str, _part("preprocessing", DefaultPreprocessor)]
    previous_stage: str | None = None
    architecture: _Architecture
    resampling_fn_data: str
    resampling_fn_data_kwargs: Arguments
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: Arguments
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: Arguments

    @model_validator(mode="after")
    def _fits_together(self) -> _Configuration:
        if math.prod(self.patch_size) > LARGEST_PATCH:
            raise ValueError(f"patch_size = {self.patch_size} has more than {LARGEST_PATCH} voxels")
        if len(self.spacing) != len(self.patch_size):
            raise ValueError(f"spacing = {self.spacing} has not one value for each axis of patch_size")
        for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
            function = _found(getattr(self, key), "preprocessing.resampling")
            folder = "nnunetv2.preprocessing.resampling."
            if not inspect.isfunction(function) or not function.__module__.startswith(folder):
                raise ValueError(f"{key} = {getattr(self, key)!r:.80} is not a resampling function of nnU-Net")
            try:
                inspect.signature(function).bind(None, None, None, None, **getattr(self, f"{key}_kwargs"))
            except TypeError as error:
                raise ValueError(f"{key}_kwargs: {error}") from error
        return self


def check_model(folder: Path, description: Description, plans: Any, dataset_json: Any) -> PlansManager:
    """Check the contents of plans.json and dataset.json, which may then be used as ``description`` says.

    Raises:
        ModelError: what is wrong, and where.
    """
    try:
        return _checked(description, plans, dataset_json)
    except ValidationError as error:
        raise ModelError(f"{folder} cannot be used: {error.title[1:].lower()}: {fault(error)}") from error
    except Exception as error:  # the checks above, those of MaskSAM's config, and nnU-Net's own, of many kinds
        raise ModelError(f"{folder} cannot be used: {PLANS} and {DATASET}: {in_short(error)}") from error


def _checked(description: Description, plans: Any, dataset_json: Any) -> PlansManager:
    dataset, about = _Dataset.model_validate(dataset_json), _Plans.model_validate(plans)
    if (about.dataset_name, about.plans_name) != (description.dataset, description.plans):
        raise ValueError(f"dataset_name, plans_name = {about.dataset_name, about.plans_name} are not model.json's")
    manager = PlansManager(plans)
    if dataset.file_ending not in (reader := manager.image_reader_writer_class).supported_file_endings:
        raise ValueError(f"file_ending = {dataset.file_ending!r} is not one of {reader.__name__}'s")
    resolved = manager.get_configuration(description.configuration)
    configuration = _Configuration.model_validate(resolved.configuration)
    schemes, channels = configuration.normalization_schemes, len(dataset.channel_names)
    if not len(schemes) == len(configuration.use_mask_for_norm) == channels:
        raise ValueError(
            f"normalization_schemes or use_mask_for_norm has not one entry for each of {channels} channels"
        )
    for channel, scheme in enumerate(schemes):
        if str(channel) not in about.intensities:
            raise ValueError(f"foreground_intensity_properties_per_channel has no channel {channel}")
        if scheme == "CTNormalization":
            _Intensities.model_validate(about.intensities[str(channel)])
    read_config(resolved)
    manager.get_label_manager(dataset_json)
    return manager
