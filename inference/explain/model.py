"""The trained model to look into."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.json_files import read_json
from masksam_nnunet.plans.architecture import read_config

from ..label_maps import Classes
from ..model_folders import find_models
from ..predictor import MaskSAMPredictor
from .errors import ExplainError


@dataclass(frozen=True)
class Model:
    """A trained MaskSAM that has not been loaded yet.

    Attributes:
        folder: its results folder.
        folds: of which checkpoints are there; the first one's queries are shown.
        checkpoint: their file name.
        dataset_json: the model's own.
        config: of the network.
        classes: that it tells apart.
        cascade: whether it needs the labels that another configuration predicted.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str
    dataset_json: dict[str, Any]
    config: MaskSAMConfig
    classes: Classes
    cascade: str | None


def find_model(
    dataset: str, trainer: str, plans: str, configuration: str, folds: Sequence[str], checkpoint: str
) -> Model:
    """Look a model up and check that it is one of ours, without opening its checkpoints.

    Raises:
        ModelError: there is no such model.
        ExplainError: it is no MaskSAM, or a file of it is missing.
    """
    folder = find_models(dataset, trainer, plans, [configuration])[1][0]
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise ExplainError(f"{folder / name} is missing: copy it from where the model was trained")
    settings = PlansManager(read_json(folder / "plans.json")).get_configuration(configuration)
    config = read_config(settings)
    if config is None:
        ours = [f.name for f in sorted(folder.parent.glob("*__*__*")) if f.name.startswith("MaskSAM")]
        raise ExplainError(
            f"{folder.name} holds {settings.network_arch_class_name.rsplit('.', 1)[-1]}, no MaskSAM: it has no queries "
            f"to show. Name a trained MaskSAM (-tr); there are: {', '.join(ours) or 'none'}. For a stock network's "
            "probabilities use nnUNetv2_predict --save_probabilities"
        )
    for fold in folds:
        if not (folder / f"fold_{fold}" / checkpoint).is_file():
            there = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
            raise ExplainError(
                f"-f {fold}: {folder / f'fold_{fold}' / checkpoint} is missing; folds with a {checkpoint}: "
                f"{' '.join(there) or 'none'}. Train it, or name another fold (-f) or checkpoint (-chk)"
            )
    description = read_json(folder / "dataset.json")
    classes = Classes.from_dataset_json(description)
    return Model(folder, tuple(folds), checkpoint, description, config, classes, settings.previous_stage_name)


def load_predictor(model: Model, device: torch.device, mirroring: bool) -> MaskSAMPredictor:
    """nnU-Net's own way to the trained network, without its remarks and warnings.

    Raises:
        ExplainError: a checkpoint cannot be read.
        WeightsError: a checkpoint is lean, and SAM's file for it is missing or another one.
    """
    os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
    folds = tuple(fold if fold == "all" else int(fold) for fold in model.folds)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = MaskSAMPredictor(
            device=device, use_mirroring=mirroring, perform_everything_on_device=device.type == "cuda", allow_tqdm=False
        )
        try:
            predictor.initialize_from_trained_model_folder(str(model.folder), folds, model.checkpoint)
        except (OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ExplainError(
                f"{model.folder}: {model.checkpoint} of fold {', '.join(model.folds)} cannot be read ({error!r}); "
                "train it again, or name another checkpoint (-chk)"
            ) from error
    return predictor
