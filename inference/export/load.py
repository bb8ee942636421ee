"""Read a portable model, check it, and predict with it. No pickle is opened: weights are safetensors, all else JSON."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from masksam_nnunet.errors import MaskSAMError, ModelError, in_short

from ..models import network_to_predict
from ..predictor import MaskSAMPredictor
from .description import DATASET, PLANS, SHARED, Description, fold_file, read_description, read_foreign_json, verify
from .foreign_plans import check_model


class PortablePlans(NamedTuple):
    """All of a checked model but its weights."""

    description: Description
    plans: PlansManager
    dataset_json: dict[str, Any]
    folds: tuple[str, ...]
    """Those that were asked for."""


class PortableModel(NamedTuple):
    """A checked model. Tensors of ``states``, one state dict for each fold, stay in the files until they are used."""

    about: PortablePlans
    states: list[dict[str, Tensor]]
    network: nn.Module
    """With the first fold's weights."""


@dataclass(frozen=True)
class PortablePredictModel:
    """Folds of a portable model, as ``masksam predict`` takes models; see ``inference.models.Model``.

    Attributes:
        folder: the model's.
        wanted: numbers or "all"; all folds that there are if not given.
    """

    folder: Path
    wanted: Sequence[int | str] | None = None

    @property
    def name(self) -> str:
        return self._content.description.model_folder

    @property
    def configuration(self) -> str:
        return self._content.description.configuration

    @property
    def plans(self) -> dict[str, Any]:
        plans: dict[str, Any] = self._content.plans.plans
        return plans

    @property
    def dataset_json(self) -> dict[str, Any]:
        return self._content.dataset_json

    def describe(self) -> dict[str, Any]:
        """Name the model by its folds and hashes: folders are moved and renamed."""
        files = {name: entry.sha256 for name, entry in self._content.description.files.items()}
        return {"model": self.name, "folds": list(self._content.folds), "portable": files}

    def check(self) -> None:
        """Check all but the weights.

        Raises:
            ModelError: something is missing, damaged or not safe.
        """
        _ = self._content

    def load(self, predictor: MaskSAMPredictor) -> None:
        """Check the weights, and have the predictor predict with them; errors are those of :func:`load_portable`."""
        load_portable(predictor, self.folder, self.wanted)

    @functools.cached_property
    def _content(self) -> PortablePlans:
        return read_plans(self.folder, self.wanted)


def load_portable(predictor: nnUNetPredictor, folder: str | Path, folds: Sequence[int | str] | None = None) -> None:
    """Make ``predictor`` predict with a portable model, as ``initialize_from_trained_model_folder`` does with others.

    Tensors that folds share are in memory twice at most: once in the network, and once, as far as the system keeps
    it there, in the mapped file.

    Args:
        predictor: nnU-Net's, or of a subclass.
        folder: a portable model's.
        folds: all that the model has if not given.

    Raises:
        ModelError: a file is missing, damaged or not the one that was written; it names anything but parts of nnU-Net
            and MaskSAM; there is no such fold; or the trainer is not installed.
    """
    (description, plans, dataset_json, _), states, network = read_model(Path(folder), folds)
    predictor.manual_initialization(
        network,
        plans,
        plans.get_configuration(description.configuration),
        states,
        dataset_json,
        description.trainer,
        description.mirroring_axes,
    )


def read_model(folder: Path, folds: Sequence[int | str] | None = None) -> PortableModel:
    """Read and check all that is needed of ``folds``; errors are those of :func:`load_portable`."""
    about = read_plans(folder, folds)
    needed = [SHARED, *map(fold_file, about.folds)]
    verify(folder, about.description, [name for name in needed if name in about.description.files])
    try:
        states = read_states(folder, about.description, about.folds)
        network = network_with(
            about.description, about.plans, about.dataset_json, dict(zip(about.folds, states, strict=True))
        )
    except ModelError as error:
        raise ModelError(f"{folder} cannot be used: {error}") from error
    return PortableModel(about, states, network)


def read_plans(folder: Path, folds: Sequence[int | str] | None = None) -> PortablePlans:
    """Read and check all but the weights; errors are those of :func:`load_portable`."""
    description = read_description(folder)
    named = [folds] if isinstance(folds, str) else description.folds if folds is None else folds
    chosen = tuple(dict.fromkeys(map(str, named)))
    missing = [fold for fold in chosen if fold not in description.folds]
    if missing or not chosen:
        there = " ".join(description.folds)
        raise ModelError(f"{folder} has no fold {' or '.join(missing) or '(none given)'}: name some of {there} (-f)")
    verify(folder, description, [PLANS, DATASET])
    dataset_json = read_foreign_json(folder / DATASET)
    try:
        plans = check_model(description, read_foreign_json(folder / PLANS), dataset_json)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be used: {error}") from error
    return PortablePlans(description, plans, dataset_json, chosen)


def read_states(folder: Path, description: Description, folds: Sequence[str]) -> list[dict[str, Tensor]]:
    """The state dicts of ``folds``. Tensors stay in the files until used; shared ones are the same objects.

    Raises:
        ModelError: a file is damaged, or the files do not fit together.
    """
    shared = _read_tensors(folder / SHARED) if SHARED in description.files else {}
    states = []
    for fold in folds:
        state = shared | _read_tensors(folder / fold_file(fold))
        for name, other in description.same_as.items():
            if name in state or other not in state:
                raise ModelError(f"same_as = {name!r:.80}: {other!r:.80} does not fit {fold_file(fold)}")
            state[name] = state[other]
        states.append(state)
    return states


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    # The library's own errors, and those of PyTorch for types that this version does not have.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({error}); fetch the model again") from error


def network_with(
    description: Description,
    plans: PlansManager,
    dataset_json: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    """The network of a checked model, with the first of the folds' ``states``; all of them must fit.

    It is first built without memory: nothing is allocated for a network that does not fit its weights.

    Raises:
        ModelError: it cannot be built, or the weights are another network's.
    """

    def build(device: str) -> nn.Module:
        try:
            with torch.device(device):
                return network_to_predict(plans, description.configuration, dataset_json, description.trainer)
        except Exception as error:  # constructors of networks, given arguments that may be anything
            raise ModelError(f"trainer {description.trainer} cannot build the network: {in_short(error)}") from error

    network = build("meta")
    expected = network.state_dict()
    for fold, state in states.items():
        _check_fit(fold, expected, state)
    copies: dict[int, Tensor] = {}
    fitted = {
        name: copies.setdefault(id(tensor), tensor.to(expected[name].dtype, copy=True))
        for name, tensor in next(iter(states.values())).items()
    }
    try:
        network.load_state_dict(fitted, assign=True)
    except MaskSAMError as error:  # a network that says it is lean; a portable one never is
        raise ModelError(str(error)) from error
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):  # buffers that are not saved
        network = build("cpu")
        network.load_state_dict(fitted)
    return network


def _check_fit(fold: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [n for n, t in expected.items() if n in state and state[n].shape != t.shape],
    }
    found = "; ".join(f"{len(names)} {kind}, such as {names[0]!r:.100}" for kind, names in faults.items() if names)
    if found:
        raise ModelError(f"the weights of fold {fold} are not those of the network that {PLANS} describes: {found}")
