"""A portable model into nnU-Net's results folder, for nnU-Net's own commands.

They need pickled checkpoints. Those are written from the checked tensors, with plain types only, so that PyTorch's
``weights_only=True`` accepts them too; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masksam_nnunet.errors import PortableError

from .archive import unpack
from .description import DATASET, MODEL, PLANS
from .load import PortableModel, is_portable, read_model
from .nnunet_zip import CHECKPOINT


class Import(NamedTuple):
    """What was installed."""

    folder: Path
    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: tuple[str, ...]


def import_model(source: Path, results: Path, force: bool = False) -> Import:
    """Check a portable model and install it as ``results/DATASET/TRAINER__PLANS__CONFIGURATION``.

    The model appears there whole or not at all. Its checkpoints predict; a training cannot go on from them, since
    a portable model holds no optimizer.

    Args:
        source: a portable model's folder or zip file.
        results: nnU-Net's results folder; made if need be.
        force: replace an earlier model of that name, all folds of it.

    Raises:
        PortableError: the model is damaged, not safe, of parts that are not installed; or there already is one.
    """
    with _unpacked(source) as folder:
        model = read_model(folder)
        about = model.description
        target = results / about.dataset / about.model_folder
        if os.path.lexists(target) and not force:
            raise PortableError(
                f"{target} is there already: name another results folder (--to), or add --force to replace it and all "
                "of its folds"
            )
        if os.path.lexists(target) and (target.is_symlink() or not (target / PLANS).is_file()):
            raise PortableError(f"{target} is no model's folder, so --force does not replace it; move it away")
        try:
            _install(model, folder, target)
        except (OSError, RuntimeError) as error:  # the latter is how torch.save says that a disk is full
            reason = getattr(error, "strerror", None) or str(error)
            raise PortableError(f"cannot write {target}: {reason}; make room or name another folder (--to)") from error
    return Import(target, about.dataset, about.trainer, about.plans, about.configuration, about.folds)


def unpack_model(source: Path, target: Path) -> Path:
    """Unpack a portable model's zip file into the folder ``target``, and check it; it appears whole or not at all.

    Raises:
        PortableError: as :func:`import_model`.
    """
    if os.path.lexists(target):
        raise PortableError(f"{target} is there already: name another folder (--unpack)")
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        unpack(source, draft)
        read_model(draft)
        os.rename(draft, target)
    except OSError as error:
        raise PortableError(f"cannot write {target}: {error.strerror or error}; name another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


@contextlib.contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """The folder of a portable model, unpacked for a while where it is a zip file."""
    if source.is_dir():
        if not is_portable(source):
            raise PortableError(
                f"{source} is no portable model: it has no {MODEL} of one. masksam export --format safetensors writes "
                "one; zip files of nnU-Net's own export are for nnUNetv2_install_pretrained_model_from_zip"
            )
        yield source
        return
    try:
        with tempfile.TemporaryDirectory(prefix="masksam-import-") as folder:
            unpack(source, Path(folder) / "model")
            yield Path(folder) / "model"
    except OSError as error:
        raise PortableError(
            f"cannot unpack {source}: {error.strerror or error}; set TMPDIR to a larger disk"
        ) from error


def _install(model: PortableModel, source: Path, target: Path) -> None:
    new = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, earlier = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "earlier"))
    try:
        draft.mkdir()
        for name in (PLANS, DATASET):
            shutil.copyfile(source / name, draft / name)
        for fold, state in zip(model.folds, model.states, strict=True):
            (draft / f"fold_{fold}").mkdir()
            torch.save(_checkpoint(model, fold, state), draft / f"fold_{fold}" / CHECKPOINT)
        if target.exists():
            os.rename(target, earlier)
        os.rename(draft, target)
    finally:
        if earlier.exists() and not target.exists():
            os.rename(earlier, target)
        for rest in (draft, earlier):
            shutil.rmtree(rest, ignore_errors=True)
        if new and not target.exists():
            with contextlib.suppress(OSError):
                target.parent.rmdir()


def _checkpoint(model: PortableModel, fold: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """What nnU-Net's predictor and its ``-pretrained_weights`` read of a checkpoint, and what says where it is from."""
    about = model.description
    copies: dict[int, Tensor] = {}  # out of the one large storage that a safetensors file is
    return {
        "network_weights": {name: copies.setdefault(id(t), t.clone()) for name, t in state.items()},
        "trainer_name": about.trainer,
        "init_args": {
            "plans": model.plans.plans,
            "configuration": about.configuration,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": model.dataset_json,
        },
        "inference_allowed_mirroring_axes": about.mirroring_axes,
        "current_epoch": about.epochs.get(fold, 0),
        "imported": "by masksam import: without optimizer and logging, for prediction and as pre-trained weights",
    }
