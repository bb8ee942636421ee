"""Every error that a user can act on: what is wrong, the value received, the remedy."""

from __future__ import annotations

import errno
from pathlib import Path


class MaskSAMError(Exception):
    """Base of all errors of this package. Commands print its message without a traceback."""


class UsageError(MaskSAMError):
    """An option, or a file or folder that an option names, cannot be used."""


class DataError(MaskSAMError):
    """A dataset, image, label map, split or plans file is missing, damaged or inconsistent."""


class TrainingError(MaskSAMError):
    """A training cannot start, continue or be saved."""


class FetchError(MaskSAMError):
    """A file cannot be fetched, read or trusted. What, what was seen, the remedy."""


class WeightsError(FetchError):
    """SAM's weights are missing, damaged, untrusted or do not fit."""


class CheckpointFileError(FetchError):
    """One of nnU-Net's checkpoints is missing, damaged or untrusted. What, what was seen, the remedy."""


class ModelError(DataError):
    """A trained model is missing, incomplete or damaged."""


class DemoError(DataError):
    """The demo cannot go on; the message names the option or step, what was found, and the remedy."""


class ExportError(DataError):
    """A model cannot be exported; the message names what is missing, where, and the remedy."""


class PredictError(DataError):
    """Nothing can be predicted, or no more; the message names the option or file, what was found, and the remedy."""


class CaseError(MaskSAMError):
    """One case cannot be predicted; the message names the file, what is wrong with it, and the remedy."""


class PortableError(DataError):
    """A portable model cannot be written, checked or loaded."""


class BenchmarkError(MaskSAMError):
    """Names what is wrong, where, and the remedy; shown without a traceback."""


class CheckpointError(BenchmarkError):
    """A trained fold's checkpoint is not readable."""


def unwritable(error: OSError, path: Path) -> FetchError:
    """The ``FetchError`` for an operating system error met while ``path``, in the cache, was written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or set MASKSAM_CACHE to a folder on a larger disk"
    else:
        remedy = "make the folder writable or set MASKSAM_CACHE to another one"
    return FetchError(f"cannot write {path}: {reason}; {remedy}")


def in_short(error: BaseException) -> str:
    """What a library's error says, in one line with its kind."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[-300:]}" if words else type(error).__name__
