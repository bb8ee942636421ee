"""Import portable models: unpack zip files of unknown origin, check, and install into nnU-Net's results folder.

Unpacking is bounded, and nothing but a model's files comes out. nnU-Net's own commands need pickled checkpoints: these
are written from the checked tensors, with plain types only, so that PyTorch's ``weights_only=True`` accepts them too.
Nothing is unpickled.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.files import atomic_folder

from .description import DATASET, LARGEST_JSON, PLANS, Description, is_file_of_a_model
from .load import PortableModel
from .write import CHECKPOINT, writing

LARGEST_MODEL = 2**37
"""Bytes, unpacked: 128 GiB, of which a fold of ViT-H takes 2.8."""
LARGEST_RATIO = 200
"""Size of a file over its size in the archive. Weights hardly shrink, JSON to a tenth, a bomb to a thousandth."""

_CHUNK = 2**20
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError)
"""What zipfile and zlib raise for archives that are damaged, encrypted or of unknown methods."""


def import_model(source: Path, results: Path, force: bool = False) -> tuple[Path, Description]:
    """Check a portable model and install it as ``results/DATASET/TRAINER__PLANS__CONFIGURATION``.

    The model appears there whole or not at all. Its checkpoints predict; a training cannot continue from them, since
    a portable model holds no optimizer.

    Args:
        source: a portable model's folder or zip file.
        results: nnU-Net's results folder; made if need be.
        force: replace an earlier model of that name, all folds of it.

    Returns:
        The installed folder, and what it holds.

    Raises:
        ModelError: the model is damaged, not safe, or needs parts that are not installed.
        UsageError: there already is one, or it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="masksam-import-") as scratch:
        folder = source if source.is_dir() else Path(scratch)
        if folder != source:
            unpack(source, folder)
        model = PortableModel(folder)
        _, states = model.read()
        target = results / model.description.dataset / model.name
        if os.path.lexists(target):
            if not force:
                raise UsageError(f"{target} exists: name another results folder (--to), or add --force to replace it")
            if target.is_symlink() or not (target / PLANS).is_file():
                raise UsageError(f"{target} is not a model's folder, so --force does not replace it: move it away")
        with writing(target), atomic_folder(target) as draft:
            for name in (PLANS, DATASET):
                shutil.copyfile(folder / name, draft / name)
            for fold, state in zip(model.folds, states, strict=True):
                (draft / f"fold_{fold}").mkdir()
                with (draft / f"fold_{fold}" / CHECKPOINT).open("wb") as stream:
                    torch.save(_checkpoint(model, fold, state), stream)
    return target, model.description


def unpack_model(source: Path, target: Path) -> Path:
    """Unpack a portable model's zip file into the folder ``target``, and check it; it appears whole or not at all.

    Raises:
        ModelError, UsageError: as :func:`import_model`.
    """
    if os.path.lexists(target):
        raise UsageError(f"--unpack {target} exists: name another folder")
    with writing(target), atomic_folder(target) as draft:
        unpack(source, draft)
        PortableModel(draft).read()
    return target


def _checkpoint(model: PortableModel, fold: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """What nnU-Net's predictor and its ``-pretrained_weights`` read of a checkpoint."""
    about = model.description
    copies: dict[int, Tensor] = {}  # out of the one large storage that a safetensors file is
    return {
        "network_weights": {name: copies.setdefault(id(t), t.clone()) for name, t in state.items()},
        "trainer_name": about.trainer,
        "init_args": {
            "plans": model.plans,
            "configuration": about.configuration,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": model.dataset_json,
        },
        "inference_allowed_mirroring_axes": about.mirroring_axes,
        "current_epoch": about.epochs.get(fold, 0),
        "imported": "by masksam import: without optimizer and logging, for prediction and as pre-trained weights",
    }


# ---- zip files -------------------------------------------------------------------------------------------------------


def unpack(file: Path, folder: Path) -> None:
    """Unpack a portable model into an empty folder; after an error, discard the folder.

    What the archive's headers say is not trusted: bytes are counted while it is unpacked.

    Raises:
        ModelError: not a zip file, damaged, too large, or holding anything but a model's files, in one folder.
        UsageError: there is no such file, or the folder cannot be written.
    """
    if not file.is_file():
        raise UsageError(f"{file} is not a file: name a portable model's folder or zip file")
    left = LARGEST_MODEL
    try:
        with _Bounded(file) as stream, zipfile.ZipFile(stream) as archive:
            for name, info in _members(archive, file).items():
                # A header can claim any size of a packed file, but not one beyond the archive's.
                packed = min(max(info.compress_size, 1), file.stat().st_size)
                most = min(left, packed * LARGEST_RATIO, LARGEST_JSON if name.endswith(".json") else left)
                written = 0
                with archive.open(info) as source, (folder / name).open("xb") as target:
                    while chunk := source.read(_CHUNK):
                        written += len(chunk)
                        if written > most:
                            raise ModelError(f"refused {file}: {name} has more than {most} bytes unpacked")
                        target.write(chunk)
                left -= written
    except OSError as error:  # also of archives that point before their begin
        raise UsageError(f"cannot unpack {file} into {folder}: {error.strerror or error}; make room") from error
    except _DAMAGED as error:
        raise ModelError(f"{file} is not a zip file, or damaged ({error}): fetch it again") from error


class _Bounded(io.FileIO):
    """A file of which little is read at once: zipfile would take a list of contents of any length. It refuses half."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(2 * _CHUNK if size is None or size < 0 else min(size, 2 * _CHUNK))


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their names, once it is sure that there is nothing else."""
    result: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for info in archive.infolist():
        folder, slash, name = info.filename.rpartition("/")
        folders.add(folder + slash)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if slash and not name and kind in (0, stat.S_IFDIR):
            continue  # the folder itself
        refused = {
            "is a pickled checkpoint of nnU-Net: if you trust its source, install it with "
            "nnUNetv2_install_pretrained_model_from_zip": name.endswith(".pth"),
            "is not a file of a portable model": info.orig_filename != info.filename or not is_file_of_a_model(name),
            "comes twice": name in result,
            "is encrypted": info.flag_bits & 1,
            "is neither stored nor deflated": info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
            "is a link or a device, not a file": kind not in (0, stat.S_IFREG),
        }
        if reasons := [reason for reason, holds in refused.items() if holds]:
            raise ModelError(f"refused {file}: {info.orig_filename!r:.100} {reasons[0]}")
        result[name] = info
    if len(folders) > 1:
        raise ModelError(f"refused {file}: its files lie in several folders, {sorted(folders)!r:.100}")
    return result
