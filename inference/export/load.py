"""Read a portable model, check it, and predict with it. No pickle is opened: weights are safetensors, all else JSON."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from masksam_nnunet.errors import MaskSAMError, ModelError, in_short

from ..models import network_to_predict
from .description import DATASET, PLANS, SHARED, Description, fold_file, read_description, read_foreign_json, verify
from .foreign_plans import check_model


@dataclass(frozen=True)
class PortableModel:
    """Folds of a portable model; files are checked when a property first needs them. See ``inference.models.Model``.

    Properties and methods raise ModelError where a file is missing, damaged or not the one that was written, where it
    names anything but parts of nnU-Net and MaskSAM, where there is no such fold, or the trainer is not installed.

    Attributes:
        folder: the model's.
        wanted: numbers or "all"; all folds that there are if not given.
    """

    folder: Path
    wanted: Sequence[int | str] | None = None

    @functools.cached_property
    def description(self) -> Description:
        return read_description(self.folder)

    @functools.cached_property
    def folds(self) -> tuple[str, ...]:
        there = self.description.folds
        chosen = there if self.wanted is None else tuple(dict.fromkeys(map(str, self.wanted)))
        missing = [fold for fold in chosen if fold not in there]
        if missing or not chosen:
            raise ModelError(f"{self.folder} lacks the folds {' '.join(missing)}: name some of {' '.join(there)} (-f)")
        return chosen

    @functools.cached_property
    def manager(self) -> PlansManager:
        """nnU-Net's, of the plans."""
        return check_model(self.folder, self.description, self._json(PLANS), self.dataset_json)

    @functools.cached_property
    def dataset_json(self) -> dict[str, Any]:
        return self._json(DATASET)

    @property
    def name(self) -> str:
        return f"{self.description.trainer}__{self.description.plans}__{self.description.configuration}"

    @property
    def configuration(self) -> str:
        return self.description.configuration

    @property
    def plans(self) -> dict[str, Any]:
        return self.manager.plans

    def describe(self) -> dict[str, Any]:
        """Name the model by its folds and hashes: folders are moved and renamed."""
        files = {name: entry.sha256 for name, entry in self.description.files.items()}
        return {"model": self.name, "folds": list(self.folds), "portable": files}

    def check(self) -> None:
        """Check all but the weights."""
        _ = self.folds, self.manager

    def load(self, predictor: nnUNetPredictor) -> None:
        """Have the predictor predict with it, as ``initialize_from_trained_model_folder`` does with other models."""
        about, (network, states) = self.description, self.read()
        configuration = self.manager.get_configuration(about.configuration)
        predictor.manual_initialization(
            network, self.manager, configuration, states, self.dataset_json, about.trainer, about.mirroring_axes
        )

    def read(self) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """The network with the first fold's weights, and the state dict of each fold.

        Tensors stay in the files until they are used; those that folds share are the same objects. The network is first
        built without memory: nothing is allocated for one that does not fit its weights.
        """
        self.check()
        shared_files = [SHARED] if SHARED in self.description.files else []
        verify(self.folder, self.description, [*shared_files, *map(fold_file, self.folds)])
        shared = _read_tensors(self.folder / SHARED) if shared_files else {}
        own = [_read_tensors(self.folder / fold_file(fold)) for fold in self.folds]
        what = self.manager, self.configuration, self.dataset_json, self.description.trainer
        try:
            empty = build_network(*what, "meta")
            names, shapes = first_names(empty), shapes_of(empty.state_dict())
            for fold, state in zip(self.folds, own, strict=True):
                check_fit(f"fold {fold}", shared | state, {name: shapes[name] for name in names.values()})
            states = [{name: (shared | state)[first] for name, first in names.items()} for state in own]
            network = build_network(*what)
            network.load_state_dict(states[0])
        except (MaskSAMError, RuntimeError) as error:  # a network that says it is lean; a type of number
            raise ModelError(f"{self.folder} cannot be used: {error}") from error
        return network, states

    def _json(self, name: str) -> Any:
        verify(self.folder, self.description, [name])
        return read_foreign_json(self.folder / name)


def build_network(
    plans: PlansManager, configuration: str, dataset_json: Mapping[str, Any], trainer: str, device: str = "cpu"
) -> nn.Module:
    """:func:`network_to_predict` on a device; raise ModelError where the trainer cannot build it, or is not there."""
    try:
        with torch.device(device):
            return network_to_predict(plans, configuration, dataset_json, trainer)
    except Exception as error:  # constructors of networks, given arguments that may be anything
        raise ModelError(f"trainer {trainer} cannot build the network: {in_short(error)}") from error


def first_names(network: nn.Module) -> dict[str, str]:
    """The first name of each tensor in a state dict, by name: modules of nnU-Net's U-Nets have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in network.state_dict(keep_vars=True).items()}


def shapes_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each tensor; None for anything else."""
    return {name: getattr(tensor, "shape", None) for name, tensor in state.items()}


def check_fit(what: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ModelError where the tensors of a state dict have other names or shapes than ``expected``."""
    if odd := sorted({name for name, _ in expected.items() ^ shapes_of(state).items()}):
        raise ModelError(
            f"the weights of {what} do not fit the network in {PLANS}: {len(odd)} tensors are missing, unexpected or "
            f"of another shape, such as {odd[0]!r:.100}"
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    # The library's own errors, and those of PyTorch for types that this version does not have.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({error}); fetch the model again") from error
