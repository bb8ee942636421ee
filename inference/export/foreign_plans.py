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
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from masksam_nnunet.errors import ModelError, in_short
from masksam_nnunet.plans.architecture import NETWORK_CLASS, read_config

from .description import DATASET, PLANS, Description, fault

LARGEST_AXIS, LARGEST_PATCH = 4096, 2**28
"""Voxels."""
MOST_PARTS = 100
"""Stages of a network, or blocks of a stage. Legitimate networks have ten."""

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


def _is_resampling(name: str) -> str:
    found, folder = _found(name, "preprocessing.resampling"), "nnunetv2.preprocessing.resampling."
    if not inspect.isfunction(found) or not found.__module__.startswith(folder):
        raise ValueError("it is not a resampling function of nnU-Net")
    return name


Resampling = Annotated[str, AfterValidator(_is_resampling)]


class _Foreign(BaseModel):
    """A part of nnU-Net's JSON files. Other keys than those that are read may be there."""

    model_config = ConfigDict(strict=True)


class _Plans(_Foreign):
    dataset_name: str
    plans_name: str
    image_reader_writer: Annotated[str, _part("imageio", BaseReaderWriter)]
    label_manager: Annotated[str, _part("utilities.label_handling", LabelManager)] = "LabelManager"
    configurations: dict[str, dict[str, Any]]


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
    normalization_schemes: list[Annotated[str, _part("preprocessing.normalization", ImageNormalization)]]
    preprocessor_name: Annotated[str, _part("preprocessing", DefaultPreprocessor)]
    architecture: _Architecture
    resampling_fn_data: Resampling
    resampling_fn_seg: Resampling
    resampling_fn_probabilities: Resampling

    @model_validator(mode="after")
    def _is_small(self) -> _Configuration:
        if math.prod(self.patch_size) > LARGEST_PATCH:
            raise ValueError(f"patch_size = {self.patch_size} has more than {LARGEST_PATCH} voxels")
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
    about = _Plans.model_validate(plans)
    if (about.dataset_name, about.plans_name) != (description.dataset, description.plans):
        raise ValueError(f"dataset_name, plans_name = {about.dataset_name, about.plans_name} are not model.json's")
    manager = PlansManager(plans)
    reader, file_ending = manager.image_reader_writer_class, dataset_json["file_ending"]
    if file_ending not in reader.supported_file_endings:
        raise ValueError(f"file_ending = {file_ending!r:.80} is not one of {reader.__name__}'s")
    configuration = manager.get_configuration(description.configuration)
    _Configuration.model_validate(configuration.configuration)
    read_config(configuration)
    manager.get_label_manager(dataset_json)
    determine_num_input_channels(manager, configuration, dataset_json)
    return manager
