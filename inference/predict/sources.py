"""The models that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from masksam_nnunet.errors import PredictError
from masksam_nnunet.inference.methods import Method

from ..export.load import PortablePredictModel
from ..models import TrainedModel, trained_models
from .ensemble import parse_members
from .postprocessing import Postprocessing, find_postprocessing, read_postprocessing


def find_sources(
    dataset: str,
    trainer: str,
    plans: str,
    configuration: str,
    folds: Sequence[int | str],
    checkpoint: str,
    ensemble: Sequence[str] = (),
    postprocessing: str | None = None,
) -> tuple[list[TrainedModel], Postprocessing | None]:
    """Find what nnU-Net's options name, or ``--ensemble``.

    Args:
        dataset: ``-d``, number or name.
        trainer: ``-tr``; not used for an ensemble.
        plans: ``-p``; for members of an ensemble that name none.
        configuration: ``-c``; for members of an ensemble that name none, or empty.
        folds: ``-f``, of all models.
        checkpoint: ``-chk``, of all models.
        ensemble: members, see :func:`parse_members`.
        postprocessing: a file, or "auto".

    Raises:
        PredictError: members that make no ensemble; no such post-processing.
        ModelError: no such dataset or model.
    """
    methods = parse_members(ensemble, plans, configuration) if ensemble else [Method(trainer, plans, configuration)]
    models = trained_models(dataset, methods, folds, checkpoint)
    if postprocessing is None:
        return models, None
    if postprocessing == "auto":
        return models, find_postprocessing([model.folder for model in models], folds)
    return models, read_postprocessing(Path(postprocessing))


def portable_source(
    folder: str, folds: Sequence[int | str] | None = None, postprocessing: str | None = None
) -> tuple[list[PortablePredictModel], Postprocessing | None]:
    """A portable model, and a post-processing from a file; nothing of the model is read yet.

    Raises:
        PredictError: no such post-processing.
    """
    if postprocessing == "auto":
        raise PredictError(
            f"--postprocessing auto: {folder} is a portable model, which holds none; name a postprocessing.pkl"
        )
    models = [PortablePredictModel(Path(folder), folds)]
    return models, None if postprocessing is None else read_postprocessing(Path(postprocessing))
