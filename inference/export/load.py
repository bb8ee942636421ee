"""A portable model into nnU-Net's predictor. No pickle is opened: weights are safetensors, all else is JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from masksam_nnunet.errors import PortableError, WeightsError

from ..models import network_to_predict
from .checks import check_model
from .description import (
    DATASET,
    FORMAT,
    LARGEST_JSON,
    MODEL,
    PLANS,
    SHARED,
    Description,
    fold_file,
    read_description,
    read_foreign_json,
    verify,
)
from .weights import read_states


class PortableModel(NamedTuple):
    """A checked model. Tensors of ``states``, one state dict for each fold, stay in the files until they are used."""

    description: Description
    plans: PlansManager
    dataset_json: dict[str, Any]
    folds: tuple[str, ...]
    states: list[dict[str, Tensor]]
    network: nn.Module
    """With the first fold's weights."""


def is_portable(folder: str | Path) -> bool:
    """Whether ``folder`` is meant to be a portable model, sound or not. Raises nothing."""
    try:
        with (Path(folder) / MODEL).open("rb") as stream:
            content = json.loads(stream.read(LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_portable(predictor: nnUNetPredictor, folder: str | Path, folds: Sequence[int | str] | None = None) -> None:
    """Make ``predictor`` predict with a portable model, as ``initialize_from_trained_model_folder`` does with others.

    Works with nnU-Net's predictor and with ``MaskSAMPredictor``. What folds share is in memory twice at most: once
    in the network, and once, as far as the system keeps it there, in the mapped file.

    Args:
        predictor: nnU-Net's, or of a subclass.
        folder: a portable model's.
        folds: all that the model has if not given.

    Raises:
        PortableError: a file is missing, not the one that was written, damaged, or names what is none of nnU-Net's or
            MaskSAM's parts; no such fold; or a trainer that is not installed.
    """
    model = read_model(Path(folder), folds)
    predictor.manual_initialization(
        model.network,
        model.plans,
        model.plans.get_configuration(model.description.configuration),
        model.states,
        model.dataset_json,
        model.description.trainer,
        model.description.mirroring_axes,
    )


def read_model(folder: Path, folds: Sequence[int | str] | None = None) -> PortableModel:
    """Read and check all that is needed of ``folds``: hashes, description, plans, labels, and weights against them.

    Raises:
        PortableError: as :func:`load_portable`.
    """
    description, plans, dataset_json, chosen = read_plans(folder, folds)
    verify(folder, description, [name for name in (SHARED, *map(fold_file, chosen)) if name in description.files])
    try:
        states = read_states(folder, description, chosen)
        network = network_with(description, plans, dataset_json, dict(zip(chosen, states, strict=True)))
    except PortableError as error:
        raise PortableError(f"{folder} cannot be used: {error}") from error
    return PortableModel(description, plans, dataset_json, chosen, states, network)


def read_plans(
    folder: Path, folds: Sequence[int | str] | None = None
) -> tuple[Description, PlansManager, dict[str, Any], tuple[str, ...]]:
    """Read and check all but the weights: the description, plans and dataset.json of a model, and its ``folds``.

    Raises:
        PortableError: as :func:`load_portable`.
    """
    description = read_description(folder)
    chosen = _chosen(folder, description, folds)
    verify(folder, description, [PLANS, DATASET])
    dataset_json = read_foreign_json(folder / DATASET)
    try:
        return (
            description,
            check_model(description, read_foreign_json(folder / PLANS), dataset_json),
            dataset_json,
            chosen,
        )
    except PortableError as error:
        raise PortableError(f"{folder} cannot be used: {error}") from error


def network_with(
    description: Description,
    plans: PlansManager,
    dataset_json: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    """The network of a checked model, with the first of the folds' ``states``; all of them must fit.

    It is built without memory first: nothing is allocated for a network that does not fit its weights.

    Raises:
        PortableError: it cannot be built, or the weights are another network's.
    """

    def build(device: str) -> nn.Module:
        try:
            with torch.device(device):
                return network_to_predict(plans, description.configuration, dataset_json, description.trainer)
        except Exception as error:  # of networks' constructors, given arguments that may be anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise PortableError(f"trainer {description.trainer} cannot build the network: {reason}") from error

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
    except WeightsError as error:  # of a network that would be completed from SAM's file, and here never is
        raise PortableError(str(error)) from error
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):  # buffers that are not saved
        network = build("cpu")
        network.load_state_dict(fitted)
    return network


def _check_fit(fold: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    faults = [
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [name for name in state if name not in expected]),
        ("of another shape", [n for n, t in expected.items() if n in state and state[n].shape != t.shape]),
    ]
    if any(names for _, names in faults):
        found = "; ".join(f"{len(names)} {kind}, such as {names[0]!r:.100}" for kind, names in faults if names)
        raise PortableError(f"the weights of fold {fold} are not those of the network that {PLANS} describes: {found}")


def _chosen(folder: Path, description: Description, folds: Sequence[int | str] | None) -> tuple[str, ...]:
    chosen = description.folds if folds is None else (folds,) if isinstance(folds, str) else tuple(map(str, folds))
    chosen = tuple(dict.fromkeys(chosen))
    if missing := [fold for fold in chosen if fold not in description.folds]:
        raise PortableError(
            f"{folder} has no fold {' or '.join(missing)}; it has {' '.join(description.folds)}: name those (-f)"
        )
    if not chosen:
        raise PortableError(f"no fold of {folder} is named; it has {' '.join(description.folds)}")
    return chosen
