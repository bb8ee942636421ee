"""A trained model as a zip file that nnU-Net installs anywhere, whose checkpoints need no SAM file."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import CheckpointFileError, ExportError
from masksam_nnunet.files import read_json
from masksam_nnunet.modeling.lean import is_lean
from masksam_nnunet.plans.architecture import open_configuration

from ..models import find_models, network_to_predict

CHECKPOINT = "checkpoint_final.pth"
_MODEL_FILES = ("plans.json", "dataset.json", "dataset_fingerprint.json")
_FOLD_FILES = ("progress.png", "validation/summary.json")  # nnU-Net's export needs them


class Export(NamedTuple):
    """What was written."""

    file: Path
    checkpoints: int
    completed: int
    """How many of the checkpoints were lean."""


def export_model(
    dataset: str,
    output: Path,
    trainer: str,
    plans: str,
    configurations: Sequence[str] | None = None,
    folds: Sequence[str] = ("0", "1", "2", "3", "4"),
) -> Export:
    """Write what ``nnUNetv2_install_pretrained_model_from_zip`` installs; lean checkpoints are completed.

    All but the checkpoints is put there by nnU-Net's own export. The results folder is only read, and ``output``
    appears once it is complete; until then there is ``<output>.part``.

    Args:
        dataset: number or name.
        output: the zip file; an earlier one is replaced.
        trainer: the trainer's class.
        plans: name of the plans.
        configurations: all that were trained if not given.
        folds: numbers, or "all".

    Raises:
        ModelError: there is no such model.
        ExportError: a fold or a file of a model is missing or damaged, or the output cannot be written.
        WeightsError: a checkpoint is lean, and SAM's file for it is missing or another one.
    """
    results, models = model_folders(dataset, trainer, plans, configurations, _MODEL_FILES)
    files = [fold_checkpoint(model, fold, _FOLD_FILES) for model in models for fold in folds]
    completed = {file: checkpoint for model in models for file, checkpoint in _completed(model, files).items()}
    part = output.with_name(f"{output.name}.part")
    if output.is_dir():
        raise ExportError(f"cannot write {output}: it is a folder; name a file in it (-o)")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        names = tuple(model.name.split("__")[2] for model in models)
        export_pretrained_model(
            models[0].parent.name, str(part), names, trainer, plans, tuple(folds), save_checkpoints=()
        )
        with zipfile.ZipFile(part, "a") as archive:
            for file in files:
                _add(archive, file, str(file.relative_to(results)), completed.get(file))
        os.replace(part, output)
    except OSError as error:
        raise ExportError(
            f"cannot write {output}: {error.strerror or error}; make room or name another file (-o)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return Export(output, len(files), len(completed))


def model_folders(
    dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None, needed: Sequence[str]
) -> tuple[Path, list[Path]]:
    """nnU-Net's results folder, and in it the folders of the models, each with the files ``needed``."""
    results, models = find_models(dataset, trainer, plans, configurations)
    for file in (model / name for model in models for name in needed):
        if not file.is_file():
            raise ExportError(f"{file} is missing: without it the model cannot be used elsewhere")
        try:
            content = read_json(file)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            if file.name == "plans.json":
                open_configuration(content, file.parent.name.split("__")[2])
        except ValueError as error:  # ConfigError is one
            raise ExportError(
                f"{file} is damaged or of another version: {error} Copy it anew from where the model was trained"
            ) from error
    return results, models


def fold_checkpoint(model: Path, fold: str, beside: Sequence[str] = ()) -> Path:
    """A fold's final checkpoint, once it is there with the files ``beside`` it."""
    folder = model / f"fold_{fold}"
    if not (folder / CHECKPOINT).is_file():
        finished = sorted(file.parent.name.removeprefix("fold_") for file in model.glob(f"fold_*/{CHECKPOINT}"))
        raise ExportError(
            f"{folder / CHECKPOINT} is missing: fold {fold} has not been trained to its end. Finish it, or name the "
            f"folds to export: -f {' '.join(finished) or '(none is finished)'}"
        )
    missing = [name for name in beside if not (folder / name).is_file()]
    if missing:
        raise ExportError(
            f"{folder} lacks {' and '.join(missing)}: finish its validation with nnUNetv2_train ... {fold} --val"
        )
    return folder / CHECKPOINT


def _completed(model: Path, files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Those of the ``files`` below ``model`` that hold lean checkpoints, as full ones; files stay memory-mapped."""
    own = [file for file in files if model in file.parents]
    return {file: checkpoint for file, checkpoint, was_lean in full_checkpoints(model, own) if was_lean}


def full_checkpoints(model: Path, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any], bool]]:
    """Each of the ``files`` below ``model``, its checkpoint with all weights, and whether it was lean.

    Tensors stay in the files until they are used; of SAM's, added to lean checkpoints, there is one copy.
    """
    network: nn.Module | None = None
    for file in files:
        checkpoint = _load(file)
        was_lean = is_lean(checkpoint["network_weights"])
        if was_lean:
            network = _network(model, checkpoint) if network is None else network
            network.load_state_dict(checkpoint["network_weights"], assign=True)
            checkpoint |= {"network_weights": network.state_dict()}
        yield file, checkpoint, was_lean


def _load(file: Path) -> dict[str, Any]:
    try:
        return load_checkpoint(file)
    except CheckpointFileError as error:
        raise ExportError(str(error)) from error


def _network(model: Path, checkpoint: dict[str, Any]) -> nn.Module:
    """The network that nnU-Net builds to predict, without memory."""
    description = json.loads((model / "dataset.json").read_text())
    configuration = checkpoint["init_args"]["configuration"]
    with torch.device("meta"):
        return network_to_predict(
            PlansManager(str(model / "plans.json")), configuration, description, checkpoint["trainer_name"]
        )


def _add(archive: zipfile.ZipFile, file: Path, name: str, completed: dict[str, Any] | None) -> None:
    """Put a checkpoint into the archive, uncompressed: weights are noise."""
    if completed is None:
        archive.write(file, name, zipfile.ZIP_STORED)
        return
    with archive.open(zipfile.ZipInfo.from_file(file, name), "w", force_zip64=True) as stream:
        torch.save(completed, stream)
