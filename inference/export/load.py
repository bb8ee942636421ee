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
    """All of a checked model but its weights; ``folds`` are those that were asked for."""

    description: Description
    plans: PlansManager
    dataset_json: dict[str, Any]
    folds: tuple[str, ...]


class PortableModel(NamedTuple):
    """A checked model: one state dict for each fold, and the network with the first one's weights.

    Tensors stay in the files until they are used; those that folds share are the same objects.
    """

    about: PortablePlans
    states: list[dict[str, Tensor]]
    network: nn.Module


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
        """Check all but the weights; errors are those of :func:`load_portable`."""
        _ = self._content

    def load(self, predictor: MaskSAMPredictor) -> None:
        """Check the weights, and have the predictor predict with them; errors are those of :func:`load_portable`."""
        load_portable(predictor, self.folder, self.wanted)

    @functools.cached_property
    def _content(self) -> PortablePlans:
        return read_plans(self.folder, self.wanted)


def load_portable(predictor: nnUNetPredictor, folder: str | Path, folds: Sequence[int | str] | None = None) -> None:
    """Make ``predictor`` predict with a portable model, as ``initialize_from_trained_model_folder`` does with others.

    Args:
        predictor: nnU-Net's, or of a subclass.
        folder: a portable model's.
        folds: all that the model has if not given.

    Raises:
        ModelError: a file is missing, damaged or not the one that was written; it names anything but parts of nnU-Net
            and MaskSAM; there is no such fold; or the trainer is not installed.
    """
    (about, plans, dataset_json, _), states, network = read_model(Path(folder), folds)
    configuration = plans.get_configuration(about.configuration)
    predictor.manual_initialization(
        network, plans, configuration, states, dataset_json, about.trainer, about.mirroring_axes
    )


def read_model(folder: Path, folds: Sequence[int | str] | None = None) -> PortableModel:
    """Read and check all that is needed of ``folds``; errors are those of :func:`load_portable`."""
    about = read_plans(folder, folds)
    description = about.description
    shared_files = [SHARED] if SHARED in description.files else []
    verify(folder, description, [*shared_files, *map(fold_file, about.folds)])
    try:
        shared = _read_tensors(folder / SHARED) if shared_files else {}
        states = []
        for fold in about.folds:
            state = shared | _read_tensors(folder / fold_file(fold))
            for name, other in description.same_as.items():
                if name in state or other not in state:
                    raise ModelError(f"same_as = {name!r:.80}: {other!r:.80} does not fit {fold_file(fold)}")
                state[name] = state[other]
            states.append(state)
        named = dict(zip(about.folds, states, strict=True))
        network = network_with(description, about.plans, about.dataset_json, named)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be used: {error}") from error
    return PortableModel(about, states, network)


def read_plans(folder: Path, folds: Sequence[int | str] | None = None) -> PortablePlans:
    """Read and check all but the weights; errors are those of :func:`load_portable`."""
    description = read_description(folder)
    named = [folds] if isinstance(folds, str) else description.folds if folds is None else folds
    chosen = tuple(dict.fromkeys(map(str, named)))
    if not chosen or not set(chosen) <= set(description.folds):
        there = " ".join(description.folds)
        raise ModelError(f"{folder} does not have the folds {' '.join(chosen)}: name some of {there} (-f)")
    verify(folder, description, [PLANS, DATASET])
    dataset_json = read_foreign_json(folder / DATASET)
    try:
        plans = check_model(description, read_foreign_json(folder / PLANS), dataset_json)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be used: {error}") from error
    return PortablePlans(description, plans, dataset_json, chosen)


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

    expected = {name: tensor.shape for name, tensor in build("meta").state_dict().items()}
    for fold, state in states.items():
        found = {name: tensor.shape for name, tensor in state.items()}
        if odd := sorted({name for name, _ in expected.items() ^ found.items()}):
            raise ModelError(
                f"the weights of fold {fold} do not fit the network in {PLANS}: {len(odd)} tensors are missing, "
                f"unexpected or of another shape, such as {odd[0]!r:.100}"
            )
    network = build("cpu")
    try:
        network.load_state_dict(next(iter(states.values())))
    except (MaskSAMError, RuntimeError) as error:  # a network that says it is lean; a type of number
        raise ModelError(in_short(error)) from error
    return network
