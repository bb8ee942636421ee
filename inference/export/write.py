"""Export trained models: as a zip file for nnU-Net, or as a portable model of safetensors and JSON.

In both, lean checkpoints, which leave SAM's frozen weights out, are completed, so that no SAM file is needed.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import ModelError, UsageError, in_short
from masksam_nnunet.files import atomic_folder, atomic_write, read_json, write_json
from masksam_nnunet.modeling.sam_network import LEAN, SHA256, hash_in_hex
from masksam_nnunet.plans.architecture import open_configuration
from masksam_nnunet.sam_files import seen_before
from masksam_nnunet.sam_weights import identified

from ..models import find_models
from ..predictor import same_bits
from ..provenance import versions
from .description import DATASET, MODEL, PLANS, SHARED, Description, file_entry, fold_file, is_portable
from .load import PortableModel, build_network, check_fit, first_names, shapes_of

CHECKPOINT = "checkpoint_final.pth"
_MODEL_FILES = (PLANS, DATASET, "dataset_fingerprint.json")
_FOLD_FILES = ("progress.png", "validation/summary.json")  # nnU-Net's export needs them


class Export(NamedTuple):
    """What was written; ``completed`` is the number of checkpoints that were lean."""

    output: Path
    checkpoints: int
    completed: int


def export_model(
    dataset: str,
    output: Path,
    trainer: str,
    plans: str,
    configurations: Sequence[str] | None = None,
    folds: Sequence[str] = ("0", "1", "2", "3", "4"),
) -> Export:
    """Write a zip file that ``nnUNetv2_install_pretrained_model_from_zip`` installs.

    nnU-Net's own export writes everything but the checkpoints. The results folder is only read.

    Args:
        dataset: number or name.
        output: the zip file; an earlier one is replaced.
        trainer, plans: their names.
        configurations: all that were trained if not given.
        folds: numbers, or "all".

    Raises:
        ModelError: there is no such model, or a fold or a file of it is missing or damaged.
        CheckpointError: a checkpoint is damaged, or holds more than tensors, numbers and texts.
        UsageError: the output cannot be written.
        WeightsError: a checkpoint is lean, and SAM's file for it is missing or another one.
    """
    results, models = _model_folders(dataset, trainer, plans, configurations, _MODEL_FILES)
    files = {model: [_fold_checkpoint(model, fold, _FOLD_FILES) for fold in folds] for model in models}
    # All are read before anything is written; their tensors stay in the files.
    checkpoints = [made for model in models for made in _full_checkpoints(model, files[model])]
    if output.is_dir():
        raise UsageError(f"-o {output} is a folder: name a file in it")
    with writing(output), atomic_write(output) as draft:
        named = models[0].parent.name, str(draft), tuple(map(_configuration, models)), trainer, plans, tuple(folds)
        export_pretrained_model(*named, save_checkpoints=())
        with zipfile.ZipFile(draft, "a") as archive:
            for file, checkpoint, was_lean in checkpoints:
                name = str(file.relative_to(results))
                if was_lean:
                    with archive.open(zipfile.ZipInfo.from_file(file, name), "w", force_zip64=True) as stream:
                        torch.save(checkpoint, stream)
                else:
                    archive.write(file, name, zipfile.ZIP_STORED)
    return Export(output, len(checkpoints), sum(was_lean for *_, was_lean in checkpoints))


def find_model(dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None = None) -> Path:
    """The folder of the one trained model that fits; raise ModelError for none, UsageError for several."""
    _, models = _model_folders(dataset, trainer, plans, configurations, (PLANS, DATASET))
    if len(models) > 1:
        raise UsageError(f"a portable model has one configuration: name one of {[*map(_configuration, models)]} (-c)")
    return models[0]


def write_portable(model: Path, output: Path, folds: Sequence[str], force: bool = False) -> Export:
    """Write a trained model as a portable one; errors are those of :func:`export_model`.

    Checkpoints are read as tensors, numbers and texts only; no code in them is run.

    Args:
        model: one of nnU-Net's folders, ``TRAINER__PLANS__CONFIGURATION``.
        output: the folder to write, or a zip file of it if its name ends in .zip; it must not exist.
        folds: numbers, or "all".
        force: replace an earlier portable model.
    """
    folds = tuple(dict.fromkeys(folds))
    packed = output.suffix == ".zip"
    if os.path.lexists(output):
        if not force:
            raise UsageError(f"-o {output} exists: name another target, or add --force to replace it")
        if output.is_symlink() or not (output.is_file() if packed else is_portable(output)):
            raise UsageError(f"-o {output} is not a portable model, and --force replaces nothing else")
    made = list(_full_checkpoints(model, [_fold_checkpoint(model, fold) for fold in folds]))
    contents = {fold: content for fold, (_, content, _) in zip(folds, made, strict=True)}
    with writing(output):
        if packed:
            with atomic_write(output) as draft, tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
                _write(model, Path(scratch), contents)
                _pack(Path(scratch), draft)
        else:
            with atomic_folder(output) as folder:
                _write(model, folder, contents)
    return Export(output, len(folds), sum(was_lean for *_, was_lean in made))


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise what the file system says about ``target`` as a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}; make room or name another one") from error


def _model_folders(
    dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None, needed: Sequence[str]
) -> tuple[Path, list[Path]]:
    """nnU-Net's results folder, and in it the folders of the models, each with the files ``needed``."""
    results, models = find_models(dataset, trainer, plans, configurations)
    for model in models:
        try:
            contents = {name: dict(read_json(model / name)) for name in needed}
            open_configuration(contents[PLANS], _configuration(model))
        except (OSError, ValueError, TypeError) as error:  # ConfigError is a ValueError
            raise ModelError(f"{model} lacks one of {needed}, or it is damaged: {error}; restore it") from error
    return results, models


def _fold_checkpoint(model: Path, fold: str, beside: Sequence[str] = ()) -> Path:
    """A fold's final checkpoint, which must be there with the files ``beside`` it."""
    folder = model / f"fold_{fold}"
    if not (folder / CHECKPOINT).is_file():
        finished = sorted(file.parent.name.removeprefix("fold_") for file in model.glob(f"fold_*/{CHECKPOINT}"))
        remedy = f"finish the training, or name finished folds: -f {' '.join(finished) or '(there are none)'}"
        raise ModelError(f"{folder / CHECKPOINT} is missing: {remedy}")
    if missing := [name for name in beside if not (folder / name).is_file()]:
        raise ModelError(f"{folder} has no {' or '.join(missing)}: validate it with nnUNetv2_train ... {fold} --val")
    return folder / CHECKPOINT


def _full_checkpoints(model: Path, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any], bool]]:
    """Each of the ``files`` below ``model``, its checkpoint with all weights, and whether it was lean.

    Tensors stay in the files until they are used; all completed checkpoints share one copy of SAM's.
    """
    network: nn.Module | None = None
    for file in files:
        checkpoint = load_checkpoint(file)
        was_lean = LEAN in checkpoint["network_weights"]
        if was_lean:
            network = network or _empty_network(model, checkpoint.get("trainer_name"))
            network.load_state_dict(checkpoint["network_weights"], assign=True)
            checkpoint |= {"network_weights": network.state_dict()}
        yield file, checkpoint, was_lean


def _empty_network(model: Path, trainer: Any) -> nn.Module:
    """The network of a model, without memory for its weights."""
    plans = PlansManager(str(model / PLANS))
    return build_network(plans, _configuration(model), read_json(model / DATASET), str(trainer), "meta")


def _configuration(model: Path) -> str:
    return model.name.split("__")[2]


def _write(model: Path, folder: Path, checkpoints: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all files of the portable model into ``folder``, and read them back: what cannot be loaded is not written.

    Raises:
        ModelError: the checkpoints do not belong together, or to the model; or it would not be accepted elsewhere.
    """
    keys = "trainer_name", "inference_allowed_mirroring_axes"
    told: list[list[Any]] = [[checkpoint.get(key) for key in keys] for checkpoint in checkpoints.values()]
    if any(values != told[0] for values in told):
        raise ModelError(f"the folds of {model} differ in {' or '.join(keys)} ({told}): export each alone (-f)")
    trainer, axes = told[0]
    network = _empty_network(model, trainer)
    once = []
    for fold, checkpoint in checkpoints.items():
        state: dict[str, Tensor] = checkpoint["network_weights"]
        check_fit(f"fold {fold} of {model}", state, shapes_of(network.state_dict()))
        once.append({name: state[name] for name in first_names(network).values()})
    first, *others = once
    shared = {n: t for n, t in first.items() if others and all(same_bits(other[n], t) for other in others)}
    for name in (PLANS, DATASET):
        shutil.copyfile(model / name, folder / name)
    if shared:
        _write_tensors(folder / SHARED, shared)
    for fold, state in zip(checkpoints, once, strict=True):
        _write_tensors(folder / fold_file(fold), {name: t for name, t in state.items() if name not in shared})
    plans = read_json(model / PLANS)
    try:
        description = Description(
            dataset=plans["dataset_name"],
            plans=plans["plans_name"],
            configuration=_configuration(model),
            trainer=trainer,
            folds=tuple(checkpoints),
            epochs={fold: int(checkpoint.get("current_epoch", 0)) for fold, checkpoint in checkpoints.items()},
            mirroring_axes=None if axes is None else tuple(int(axis) for axis in axes),
            files={file.name: file_entry(file) for file in sorted(folder.iterdir())},
            versions=versions(),
            sam=_described(hash_in_hex(first.get(SHA256)), plans["dataset_name"]),
        )
        write_json(folder / MODEL, description.model_dump(mode="json"))
        PortableModel(folder).read()
    except (ModelError, LookupError, TypeError, ValueError) as error:  # ValueError: pydantic's
        raise ModelError(f"{model} cannot be exported: {error}") from error


def _described(sha256: str | None, dataset: str) -> dict[str, str]:
    """The SAM file of this hash, and whether it has seen the model's dataset; empty where there is none."""
    if sha256 is None:
        return {}
    file = identified(sha256)
    if file is None:
        return {"sha256": sha256}
    warning = seen_before(file, dataset)
    known = {"name": file.name, "licence": file.licence, "training_data": file.data}
    return {"sha256": sha256, **known, **({"warning": warning} if warning else {})}


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; raise ModelError for a full disk, or numbers that the format does not have."""
    file.touch()
    mode = file.stat().st_mode  # the library would leave a file that others cannot read
    # The format wants tensors that are contiguous and share no storage.
    alone = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(alone, str(file), {"format": "pt"})
    except (SafetensorError, KeyError) as error:
        raise ModelError(f"cannot write {file}: {in_short(error)}") from error
    file.chmod(mode)


def _pack(folder: Path, file: Path) -> None:
    """Write all files of ``folder`` to a zip file, JSON compressed and weights, which do not shrink, stored."""
    with zipfile.ZipFile(file, "w") as archive:
        for source in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(source.name)  # without a date: the same model gives the same archive
            info.compress_type = zipfile.ZIP_DEFLATED if source.suffix == ".json" else zipfile.ZIP_STORED
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            with source.open("rb") as stream, archive.open(info, "w", force_zip64=True) as member:
                shutil.copyfileobj(stream, member)
