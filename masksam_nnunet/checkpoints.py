"""Checkpoints, which are pickles, read as tensors and plain values and as nothing else.

nnU-Net's own commands run whatever code a file holds. All that this package opens itself goes through
:func:`load_tensors`. PyTorch takes seconds to import, so functions import it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, MaskSAMError


class _Record:
    """Stands for an optimizer that a training script saved whole, as SAM-Med2D's: its attributes, and no behaviour."""


# What makes numpy's scalars and arrays of numbers, as nnU-Net's logs hold them; under numpy 1 it had another address.
_MAKERS: tuple[Any, ...] = (np.float32(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
_SAFE: list[Any] = [
    *((maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in _MAKERS for core in ("_core", "core")),
    *(np.ndarray, np.dtype),
    *sorted({type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}, key=str),
    *((_Record, f"torch.optim.{name}") for name in ("adam.Adam", "adamw.AdamW", "sgd.SGD")),
    *(defaultdict, dict),
]


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net's format, on the CPU; its tensors stay in the file until they are used.

    Raises:
        CheckpointError: unreadable, damaged, not a checkpoint, or a pickle that holds code.
    """
    content = load_tensors(file, CheckpointError)
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{file} is not a checkpoint of nnU-Net: it has no 'network_weights'")
    return content


def load_tensors(file: Path, kind: type[MaskSAMError]) -> Any:
    """What ``torch.save`` wrote, on the CPU and memory-mapped where the format allows it.

    PyTorch's restricted unpickler makes tensors, numbers, texts, containers and numpy's numbers, and runs no code.

    Raises:
        kind: unreadable, damaged, or a pickle that holds code.
    """
    import torch
    from torch.serialization import safe_globals

    try:
        mapped = zipfile.is_zipfile(file)
        with safe_globals(_SAFE):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise kind(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file ends in whatever the parser meets first
        if refused := _refused(file, error):
            raise kind(f"refused {file}: loading it would run {refused}. Nothing was run") from error
        raise kind(
            f"{file} cannot be read as a checkpoint ({type(error).__name__}; {file.stat().st_size} bytes): it is "
            "damaged or truncated; copy, fetch or train it again"
        ) from error


def damage(file: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint as a zip file, PyTorch's format; None if nothing is.

    ``thorough`` compares its bytes with their checksums, which PyTorch does not do.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip() if thorough else None
    except Exception as error:  # a damaged file ends in whatever zipfile or zlib meets first
        return str(error) or repr(error)
    return None if bad is None else f"wrong checksum of {bad}"


def _refused(file: Path, error: Exception) -> str:
    """What a checkpoint would import, by name; empty where it is no pickle or a damaged one."""
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not isinstance(error, pickle.UnpicklingError):
        return ""
    try:
        with safe_globals(_SAFE):
            names = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # PyTorch's old format, or a pickle that is damaged too: the error alone names it
        names = []
    return ", ".join(names[:4] or re.findall(r"GLOBAL (\S+)", str(error)))
