"""A trained model from nnU-Net's results as a portable one: safetensors and JSON, no pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from masksam_nnunet.errors import ExportError, PortableError
from masksam_nnunet.files import write_json

from ..versions import versions
from .archive import pack
from .checks import check_model
from .description import (
    DATASET,
    MODEL,
    MOST_FOLDS,
    PLANS,
    SHARED,
    Description,
    entry,
    fold_file,
    read_description,
    read_foreign_json,
)
from .load import is_portable, network_with
from .nnunet_zip import fold_checkpoint, full_checkpoints, model_folders
from .weights import second_names, split, write_tensors


class PortableExport(NamedTuple):
    """What was written."""

    output: Path
    folds: tuple[str, ...]
    completed: int
    """How many of the checkpoints were lean."""
    shared_bytes: int
    """Of tensors that all folds agree on; 0 where there are none."""
    total_bytes: int
    """Of all files, before they are packed."""


def export_portable(
    dataset: str,
    output: Path,
    trainer: str,
    plans: str,
    configurations: Sequence[str] | None = None,
    folds: Sequence[str] = ("0", "1", "2", "3", "4"),
    force: bool = False,
) -> PortableExport:
    """Write a trained model as a portable one.

    Args:
        dataset: number or name.
        output: the folder to write, or a zip file of it if its name ends in .zip.
        trainer: the trainer's class.
        plans: name of the plans.
        configurations: one; may be left out where only one was trained.
        folds: numbers, or "all".
        force: replace an earlier portable model.

    Raises:
        ModelError: there is no such model.
        ExportError: a fold or a file of it is missing or damaged, or its checkpoint holds more than tensors, numbers
            and texts.
        PortableError: the target exists, cannot be written, or the model cannot be portable.
        WeightsError: a checkpoint is lean, and SAM's file for it is missing or another one.
    """
    _, models = model_folders(dataset, trainer, plans, configurations, (PLANS, DATASET))
    if len(models) > 1:
        names = " ".join(model.name.split("__")[2] for model in models)
        raise ExportError(f"a portable model is of one configuration, there are several: name one of {names} (-c)")
    return write_portable(models[0], output, folds, force)


def write_portable(model: Path, output: Path, folds: Sequence[str], force: bool = False) -> PortableExport:
    """Write the model in one of nnU-Net's folders, ``TRAINER__PLANS__CONFIGURATION``, as :func:`export_portable` does.

    Checkpoints are read as tensors, numbers and texts only; no code in them is run.
    """
    folds = tuple(dict.fromkeys(folds))
    if not 0 < len(folds) <= MOST_FOLDS:
        raise ExportError(f"-f names {len(folds)} folds; name 1 to {MOST_FOLDS}")
    _check_target(output, force)
    files = [fold_checkpoint(model, fold) for fold in folds]
    checkpoints = list(full_checkpoints(model, files))
    with _draft(output, force) as folder:
        done = _write(model, folder, dict(zip(folds, (content for _, content, _ in checkpoints), strict=True)))
        if output.suffix == ".zip":
            pack(folder, folder.with_suffix(".zip"))
    return done._replace(output=output, completed=sum(was_lean for *_, was_lean in checkpoints))


def _write(model: Path, folder: Path, checkpoints: dict[str, dict[str, Any]]) -> PortableExport:
    """All files of the portable model into ``folder``, which is there and empty."""
    states: dict[str, dict[str, Tensor]] = {}
    for fold, checkpoint in checkpoints.items():
        states[fold] = checkpoint["network_weights"]
        odd = [name for name, value in states[fold].items() if not isinstance(value, Tensor)]
        other = states[fold].keys() ^ next(iter(states.values())).keys()
        if odd or other:
            raise PortableError(
                f"fold {fold} of {model} cannot be written: "
                + (f"{odd[0]!r} is not a tensor" if odd else f"only some folds have {min(other)!r}; export them apart")
            )
    same_as = second_names(list(states.values()))
    once = {fold: {name: t for name, t in state.items() if name not in same_as} for fold, state in states.items()}
    shared, own = split(list(once.values()))
    for name in (PLANS, DATASET):
        shutil.copyfile(model / name, folder / name)
    if shared:
        write_tensors(folder / SHARED, shared)
    for fold, tensors in zip(states, own, strict=True):
        write_tensors(folder / fold_file(fold), tensors)
    description = _describe(model, folder, checkpoints, same_as)
    dataset_json = read_foreign_json(folder / DATASET)
    plans = check_model(description, read_foreign_json(folder / PLANS), dataset_json)
    network_with(description, plans, dataset_json, states)  # what cannot be loaded is not written
    write_json(folder / MODEL, description.to_json())
    read_description(folder)
    return PortableExport(
        folder,
        tuple(states),
        0,
        (folder / SHARED).stat().st_size if shared else 0,
        sum(file.stat().st_size for file in folder.iterdir()),
    )


def _describe(
    model: Path, folder: Path, checkpoints: dict[str, dict[str, Any]], same_as: dict[str, str]
) -> Description:
    first = next(iter(checkpoints.values()))
    for checkpoint in checkpoints.values():
        if not isinstance(checkpoint.get("init_args"), dict) or "configuration" not in checkpoint["init_args"]:
            raise PortableError(f"a checkpoint of {model} does not say its configuration: it is none of nnU-Net's")
        for key in ("trainer_name", "inference_allowed_mirroring_axes"):
            if checkpoint.get(key) != first.get(key):
                raise PortableError(
                    f"the folds of {model} differ in {key}: {first.get(key)!r} and {checkpoint.get(key)!r}; export "
                    "them apart"
                )
    axes = first.get("inference_allowed_mirroring_axes")
    plans = read_foreign_json(folder / PLANS)
    configuration = first["init_args"]["configuration"]
    try:
        # As nnU-Net resolves it; plans of its first versions hold no architecture.
        network = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    except Exception as error:
        raise PortableError(f"{model / PLANS}: no configuration {configuration}: {error!r}") from error
    return Description(
        dataset=plans.get("dataset_name"),
        plans=plans.get("plans_name"),
        configuration=configuration,
        trainer=str(first.get("trainer_name")),
        network=network,
        folds=tuple(checkpoints),
        epochs={fold: int(checkpoint.get("current_epoch", 0)) for fold, checkpoint in checkpoints.items()},
        mirroring_axes=None if axes is None else tuple(int(axis) for axis in axes),
        same_as=same_as,
        files={file.name: entry(file) for file in sorted(folder.iterdir())},
        versions=versions(),
    )


def _check_target(output: Path, force: bool) -> None:
    """Nothing is replaced without ``force``, and with it only what this command has written."""
    if not os.path.lexists(output):
        return
    if not force:
        raise PortableError(f"{output} is there already: name another target (-o), or add --force to replace it")
    if output.is_symlink() or not (output.is_file() if output.suffix == ".zip" else is_portable(output)):
        raise PortableError(f"{output} is no portable model, so --force does not replace it: name another target (-o)")


@contextmanager
def _draft(output: Path, force: bool) -> Iterator[Path]:
    """An empty folder beside ``output``, which becomes it, or whose .zip neighbour does, once all is written."""
    folder = output.with_name(f".{output.name}.{os.getpid()}.part")
    packed = folder.with_suffix(".zip")
    earlier = output.with_name(f".{output.name}.{os.getpid()}.earlier")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        _check_target(output, force)  # writing takes a while
        if output.suffix == ".zip":
            os.replace(packed, output)
            return
        if output.exists():
            os.rename(output, earlier)
        os.rename(folder, output)
    except OSError as error:
        raise PortableError(
            f"cannot write {output}: {error.strerror or error}; make room or name another target (-o)"
        ) from error
    finally:
        if earlier.exists() and not output.exists():
            os.rename(earlier, output)
        for rest in (folder, earlier):
            shutil.rmtree(rest, ignore_errors=True)
        packed.unlink(missing_ok=True)
