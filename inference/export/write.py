"""Export trained models: as a zip file for nnU-Net, or as a portable model of safetensors and JSON.

In both, lean checkpoints, which leave SAM's frozen weights out, are completed, so that no SAM file is needed.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from masksam_nnunet.modeling.lean import is_lean
from masksam_nnunet.plans.architecture import open_configuration

from ..models import find_models, network_to_predict
from ..predictor import same_bits
from ..provenance import versions
from .description import (
    DATASET,
    FORMAT,
    MODEL,
    MOST_FOLDS,
    PLANS,
    SHARED,
    VERSION,
    Description,
    file_entry,
    fold_file,
    is_portable,
    read_foreign_json,
)
from .foreign_plans import check_model
from .load import network_with

CHECKPOINT = "checkpoint_final.pth"
_MODEL_FILES = (PLANS, DATASET, "dataset_fingerprint.json")
_FOLD_FILES = ("progress.png", "validation/summary.json")  # nnU-Net's export needs them


class Export(NamedTuple):
    """What was written."""

    output: Path
    checkpoints: int
    completed: int
    """Number of checkpoints that were lean."""
    shared_bytes: int = 0
    """Of tensors that all folds agree on, and below of all files; portable models only."""
    total_bytes: int = 0


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
        names = tuple(model.name.split("__")[2] for model in models)
        export_pretrained_model(
            models[0].parent.name, str(draft), names, trainer, plans, tuple(folds), save_checkpoints=()
        )
        with zipfile.ZipFile(draft, "a") as archive:
            for file, checkpoint, was_lean in checkpoints:
                name = str(file.relative_to(results))
                if was_lean:
                    with archive.open(zipfile.ZipInfo.from_file(file, name), "w", force_zip64=True) as stream:
                        torch.save(checkpoint, stream)
                else:
                    archive.write(file, name, zipfile.ZIP_STORED)
    return Export(output, len(checkpoints), sum(was_lean for *_, was_lean in checkpoints))


def export_portable(
    dataset: str,
    output: Path,
    trainer: str,
    plans: str,
    configurations: Sequence[str] | None = None,
    folds: Sequence[str] = ("0", "1", "2", "3", "4"),
    force: bool = False,
) -> Export:
    """Write a trained model as a portable one; arguments and errors are those of :func:`export_model`, except:

    Args:
        output: the folder to write, or a zip file of it if its name ends in .zip; it must not exist.
        configurations: one; may be left out where only one was trained.
        force: replace an earlier portable model.
    """
    _, models = _model_folders(dataset, trainer, plans, configurations, (PLANS, DATASET))
    if len(models) > 1:
        names = " ".join(model.name.split("__")[2] for model in models)
        raise UsageError(f"a portable model has one configuration: name one of {names} (-c)")
    return write_portable(models[0], output, folds, force)


def write_portable(model: Path, output: Path, folds: Sequence[str], force: bool = False) -> Export:
    """Write the model in one of nnU-Net's folders, ``TRAINER__PLANS__CONFIGURATION``, as :func:`export_portable` does.

    Checkpoints are read as tensors, numbers and texts only; no code in them is run.
    """
    folds = tuple(dict.fromkeys(folds))
    if not 0 < len(folds) <= MOST_FOLDS:
        raise UsageError(f"-f names {len(folds)} folds; name 1 to {MOST_FOLDS}")
    packed = output.suffix == ".zip"
    if output.exists() or output.is_symlink():
        if not force:
            raise UsageError(f"-o {output} exists: name another target, or add --force to replace it")
        if output.is_symlink() or not (output.is_file() if packed else is_portable(output)):
            raise UsageError(f"-o {output} is not a portable model, and --force replaces nothing else")
    made = list(_full_checkpoints(model, [_fold_checkpoint(model, fold) for fold in folds]))
    contents = {fold: content for fold, (_, content, _) in zip(folds, made, strict=True)}
    with writing(output), ExitStack() as stack:
        if packed:
            archive = stack.enter_context(atomic_write(output))
            scratch = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
            folder = Path(stack.enter_context(scratch))
        else:
            folder = stack.enter_context(atomic_folder(output))
        shared, total = _write(model, folder, contents)
        if packed:
            _pack(folder, archive)
    return Export(output, len(folds), sum(was_lean for *_, was_lean in made), shared, total)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise what the file system says about ``target`` as a UsageError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {target}: {reason}; make room or name another target") from error


def _model_folders(
    dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None, needed: Sequence[str]
) -> tuple[Path, list[Path]]:
    """nnU-Net's results folder, and in it the folders of the models, each with the files ``needed``."""
    results, models = find_models(dataset, trainer, plans, configurations)
    for file in (model / name for model in models for name in needed):
        try:
            content = read_json(file)
            if file.name == PLANS:
                open_configuration(content, file.parent.name.split("__")[2])
            elif not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise ModelError(f"{file} is missing, damaged or of another version: {error}; restore it") from error
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
        was_lean = is_lean(checkpoint["network_weights"])
        if was_lean:
            if network is None:
                plans, configuration = PlansManager(str(model / PLANS)), model.name.split("__")[2]
                with torch.device("meta"):
                    dataset_json = read_json(model / DATASET)
                    network = network_to_predict(plans, configuration, dataset_json, checkpoint["trainer_name"])
            network.load_state_dict(checkpoint["network_weights"], assign=True)
            checkpoint |= {"network_weights": network.state_dict()}
        yield file, checkpoint, was_lean


def _write(model: Path, folder: Path, checkpoints: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Write all files of the portable model into ``folder``; the bytes of shared tensors, and of all files."""
    states: dict[str, dict[str, Tensor]] = {fold: content["network_weights"] for fold, content in checkpoints.items()}
    for fold, state in states.items():
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if odd := odd + list(state.keys() ^ next(iter(states.values())).keys()):
            raise ModelError(f"fold {fold} of {model}: {odd[0]!r} is not a tensor in all folds: export it alone")
    same_as = dict(set.intersection(*(set(_repeated(state)) for state in states.values())))
    once = [{name: t for name, t in state.items() if name not in same_as} for state in states.values()]
    first, *others = once
    shared = {n: t for n, t in first.items() if others and all(same_bits(other[n], t) for other in others)}
    for name in (PLANS, DATASET):
        shutil.copyfile(model / name, folder / name)
    if shared:
        _write_tensors(folder / SHARED, shared)
    for fold, state in zip(states, once, strict=True):
        _write_tensors(folder / fold_file(fold), {name: t for name, t in state.items() if name not in shared})
    plans_json, dataset_json = (read_foreign_json(folder / name) for name in (PLANS, DATASET))
    files = {file.name: file_entry(file) for file in sorted(folder.iterdir())}
    description = _describe(model, plans_json, checkpoints, same_as=same_as, files=files)
    plans = check_model(description, plans_json, dataset_json)
    network_with(description, plans, dataset_json, states)  # what cannot be loaded is not written
    write_json(folder / MODEL, description.model_dump(mode="json"))
    return files[SHARED].bytes if shared else 0, sum(entry.bytes for entry in files.values())


def _describe(model: Path, plans: Any, checkpoints: Mapping[str, Mapping[str, Any]], **more: Any) -> Description:
    first = next(iter(checkpoints.values()))
    for checkpoint in checkpoints.values():
        for key in ("trainer_name", "inference_allowed_mirroring_axes"):
            if checkpoint.get(key) != first.get(key):
                values = f"{first.get(key)} and {checkpoint.get(key)}"
                raise ModelError(f"the folds of {model} differ in {key} ({values}): export each alone (-f)")
    axes = first.get("inference_allowed_mirroring_axes")
    configuration = model.name.split("__")[2]
    try:
        configurations = {checkpoint["init_args"]["configuration"] for checkpoint in checkpoints.values()}
        if configurations != {configuration}:
            raise ValueError(f"its checkpoints are of configuration {configurations}")
        # As nnU-Net resolves it; plans of its first versions hold no architecture.
        network = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
        return Description(
            format=FORMAT,
            format_version=VERSION,
            dataset=plans.get("dataset_name"),
            plans=plans.get("plans_name"),
            configuration=configuration,
            trainer=str(first.get("trainer_name")),
            network=network,
            folds=tuple(checkpoints),
            epochs={fold: int(checkpoint.get("current_epoch", 0)) for fold, checkpoint in checkpoints.items()},
            mirroring_axes=None if axes is None else tuple(int(axis) for axis in axes),
            versions=versions(),
            **more,
        )
    except Exception as error:  # nnU-Net's of plans, pydantic's of names
        raise ModelError(f"{model} cannot be described, configuration {configuration}: {in_short(error)}") from error


def _repeated(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names under which a state dict repeats a tensor, with the first name of that tensor."""
    first: dict[object, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride(), tensor.shape
            known = first.setdefault((place, tensor.dtype), name)
            if known != name:
                yield name, known


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; raise ModelError for numbers that the format does not have, or OSError."""
    file.touch()
    mode = file.stat().st_mode  # the library would leave a file that others cannot read
    # The format wants tensors that are contiguous and share no storage.
    alone = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(alone, str(file), {"format": "pt"})
    except SafetensorError as error:
        if "os error" in str(error):  # how Rust ends the system's message
            raise OSError(str(error)) from error
        raise ModelError(f"cannot write {file}: {error}") from error
    except KeyError as error:
        raise ModelError(f"cannot write {file}: safetensors has no numbers of type {error}") from error
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
