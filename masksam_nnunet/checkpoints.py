"""nnU-Net's checkpoints, which are pickles, read as tensors and plain values and as nothing else.

nnU-Net's own commands open them with ``weights_only=False``, which runs whatever code a file holds; that cannot be
changed from here. All that this package opens itself goes through :func:`load_checkpoint`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .errors import CheckpointFileError

# What makes numpy's scalars and arrays of numbers, as nnU-Net's logs hold them; under numpy 1 it had another address.
_MAKERS: tuple[Any, ...] = (np.float32(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
_SAFE: list[Any] = [
    *((maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in _MAKERS for core in ("_core", "core")),
    *(np.ndarray, np.dtype),
    *sorted({type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}, key=str),
]


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net's format, on the CPU; its tensors stay in the file until they are used.

    PyTorch's restricted unpickler makes tensors, numbers, texts, containers and numpy's numbers, and no code is run.

    Raises:
        CheckpointFileError: unreadable, damaged, not a checkpoint, or one that asks for more than that.
    """
    try:
        # Only PyTorch's zip format can be mapped.
        mapped = zipfile.is_zipfile(file)
        with safe_globals(_SAFE):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointFileError(f"cannot read {file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if refused := _refused(file, error):
            raise CheckpointFileError(
                f"refused {file}: to load it, {refused} would have to be run, and nothing of it was. Here checkpoints "
                "may hold tensors, numbers and texts only. If you trust where it comes from, nnU-Net's own commands "
                "load it without asking"
            ) from error
        raise _unreadable(file, error) from error
    # Damaged files end in whatever the parser meets first.
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError) as error:
        raise _unreadable(file, error) from error
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointFileError(f"{file} is not a checkpoint of nnU-Net: it has no 'network_weights'")
    return content


def _refused(file: Path, error: pickle.UnpicklingError) -> str:
    """What a checkpoint would import, by name; empty where it only is no pickle."""
    try:
        with safe_globals(_SAFE):
            names = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # PyTorch's old format, or a pickle that is damaged too: told by the error alone
        names = []
    if names:
        return ", ".join(names[:4])
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else ""


def _unreadable(file: Path, error: Exception) -> CheckpointFileError:
    reason = " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__
    return CheckpointFileError(
        f"{file} cannot be read as a checkpoint ({reason}; {file.stat().st_size} bytes): damaged or truncated; copy "
        "it again, or train this fold again"
    )
