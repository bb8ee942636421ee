"""The trained model to look into."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import CheckpointError, ExplainError, WeightsError, in_short
from masksam_nnunet.inference.methods import Method
from masksam_nnunet.plans.architecture import read_config

from ..label_maps import Classes
from ..models import TrainedModel, trained_models
from ..predictor import MaskSAMPredictor


@dataclass(frozen=True)
class Explained:
    """A trained MaskSAM that has not been loaded yet.

    Attributes:
        trained: where it lies; the first fold's queries are shown.
        config: of the network.
        classes: that it tells apart.
    """

    trained: TrainedModel
    config: MaskSAMConfig
    classes: Classes

    @property
    def dataset(self) -> str:
        """Name of its dataset's folder."""
        return self.trained.folder.parent.name

    @property
    def folds(self) -> list[str]:
        """As text."""
        return [str(fold) for fold in self.trained.folds]


def find_model(
    dataset: str, trainer: str, plans: str, configuration: str, folds: Sequence[str], checkpoint: str
) -> Explained:
    """Look a model up and check that it is one of ours, without opening its checkpoints.

    Raises:
        ModelError: there is no such model.
        PredictError: a file of it is missing or cut off.
        ExplainError: it is no MaskSAM.
    """
    wrong = [fold for fold in folds if not (fold == "all" or (fold.isascii() and fold.isdecimal()))]
    if wrong:
        raise ExplainError(f"-f {wrong[0]}: is no fold; give numbers, or all")
    numbers = [fold if fold == "all" else int(fold) for fold in dict.fromkeys(folds)]
    method = Method(trainer, plans, configuration)
    (trained,) = trained_models(dataset, [method], numbers, checkpoint)
    settings = PlansManager(trained.plans).get_configuration(configuration)
    config = read_config(settings)
    if config is None:
        ours = [f.name for f in sorted(trained.folder.parent.glob("*__*__*")) if f.name.startswith("MaskSAM")]
        raise ExplainError(
            f"{trained.name} holds {settings.network_arch_class_name.rsplit('.', 1)[-1]}, no MaskSAM: it has no "
            f"queries to show. Name a trained MaskSAM (-tr); there are: {', '.join(ours) or 'none'}. For a stock "
            "network's probabilities use nnUNetv2_predict --save_probabilities"
        )
    trained.check()
    return Explained(trained, config, Classes.from_dataset_json(trained.dataset_json))


def load_predictor(model: Explained, device: torch.device, mirroring: bool) -> MaskSAMPredictor:
    """nnU-Net's own way to the trained network, without its remarks and warnings.

    Raises:
        ExplainError: a checkpoint cannot be read.
        WeightsError: a checkpoint is lean, and SAM's file for it is missing or another one.
    """
    os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = MaskSAMPredictor(
            device=device, use_mirroring=mirroring, perform_everything_on_device=device.type == "cuda", allow_tqdm=False
        )
        try:
            model.trained.load(predictor)
        except (CheckpointError, WeightsError):  # theirs say it better
            raise
        except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise ExplainError(
                f"{model.trained.folder}: {model.trained.checkpoint} of fold {', '.join(model.folds)} cannot be read "
                f"({in_short(error)}); train it again, or name another checkpoint (-chk)"
            ) from error
    return predictor
