"""The model folder: found, and loaded into the predictor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from masksam_nnunet.errors import WeightsError, in_short
from masksam_nnunet.files import read_json

from ..export.description import is_portable
from ..export.load import load_portable
from ..predictor import MaskSAMPredictor
from .errors import ContainerError, ModelFolderError

_DEPTH = 4
"""Folders between the given one and the model: an exported zip has DATASET/MODEL."""


def find_model(places: Sequence[Path]) -> Path:
    """The model in the first of ``places`` that is there and not empty: that folder, or the one model below it.

    Raises:
        ModelFolderError: there is none, or several.
    """
    place = next((path for path in places if path.is_dir() and any(path.iterdir())), None)
    named = " or ".join(map(str, places))
    if place is None:
        raise ModelFolderError(
            f"no model in {named}: mount one (--volume DIR:/opt/ml/model:ro), upload it beside the container, put it "
            "into the image, or name it with --model"
        )
    for depth in range(_DEPTH):
        found = sorted(path for path in (place.glob("/".join("*" * depth)) if depth else [place]) if _is_model(path))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(place)) for path in found)
            raise ModelFolderError(f"{place} holds several models ({names}): name one with --model")
        if found:
            return found[0]
    there = ", ".join(sorted(path.name for path in place.iterdir())[:8])
    raise ModelFolderError(
        f"{place} holds no model, but {there}: it takes plans.json, dataset.json and fold_N/checkpoint_final.pth as in "
        "nnUNet_results, or a portable model"
    )


def load_model(predictor: MaskSAMPredictor, folder: Path, folds: Sequence[str], checkpoint: str) -> list[str]:
    """Load all ``folds``, or those that there are if none is named.

    Args:
        predictor: to predict with.
        folder: a model's, as :func:`find_model` finds it.
        folds: numbers or "all".
        checkpoint: the file in each fold's folder; portable models have none.

    Returns:
        The folds.

    Raises:
        ModelFolderError: a file is missing, damaged or of another model; checkpoints are lean; or it is a cascade.
    """
    try:
        if is_portable(folder):
            load_portable(predictor, folder, folds or None)
            used = list(folds) or [str(number) for number in range(len(predictor.list_of_parameters))]
        else:
            used = _chosen(folder, folds, checkpoint)
            numbers = tuple(int(fold) if fold.isdecimal() else fold for fold in used)
            predictor.initialize_from_trained_model_folder(str(folder), numbers, checkpoint)
    except ContainerError:
        raise
    except WeightsError as error:
        raise ModelFolderError(
            f"{folder}: its checkpoints are lean, without SAM's weights, and SAM's file is not here ({error}). Make "
            "them full: masksam export ... -o model.zip, and take the model folder from that zip"
        ) from error
    except Exception as error:  # of any trainer, and of damaged files
        raise ModelFolderError(
            f"{folder} cannot be loaded ({in_short(error)}): copy it again, or export it again"
        ) from error
    configuration = predictor.configuration_manager
    if configuration.previous_stage_name is not None:
        raise ModelFolderError(
            f"{folder} is a cascade, which needs the predictions of {configuration.previous_stage_name}: take that "
            "model or another configuration, such as 3d_fullres"
        )
    return used


def channel_names(folder: Path) -> list[str]:
    """Of the model's dataset, in order.

    Raises:
        ModelFolderError: dataset.json does not say.
    """
    file = folder / "dataset.json"
    try:
        content = read_json(file)
        channels = content.get("channel_names") or content["modality"]
        return [str(channels[key]) for key in sorted(channels, key=int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{file} does not name the model's channels ({in_short(error)}): copy it again"
        ) from error


def _is_model(folder: Path) -> bool:
    return folder.is_dir() and (is_portable(folder) or (folder / "plans.json").is_file())


def _chosen(folder: Path, folds: Sequence[str], checkpoint: str) -> list[str]:
    found = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
    there = [fold for fold in found if re.fullmatch(r"\d+|all", fold)]
    if missing := [fold for fold in folds if fold not in there]:
        raise ModelFolderError(
            f"--folds {','.join(folds)}: {folder} has no {checkpoint} of fold {', '.join(missing)}; it has "
            f"{', '.join(there) or 'none'}"
        )
    numbers = [fold for fold in there if fold != "all"]  # nnU-Net too prefers these
    if not (chosen := list(folds) or numbers or there):
        files = sorted(str(file.relative_to(folder)) for file in folder.glob("fold_*/*.pth"))
        raise ModelFolderError(
            f"{folder} has no fold_N/{checkpoint}, but {', '.join(files[:5]) or 'no checkpoint at all'}: finish the "
            "training, or name the file with --checkpoint"
        )
    return chosen
