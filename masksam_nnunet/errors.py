"""The errors that a user meets when a file cannot be found, fetched, trusted or loaded."""

from __future__ import annotations

import errno
from pathlib import Path


class FetchError(RuntimeError):
    """A file cannot be fetched, read or trusted. What, what was seen, the remedy."""


class WeightsError(FetchError):
    """A SAM checkpoint is missing, damaged, untrusted or does not fit. What, what was seen, the remedy."""


class CheckpointFileError(FetchError):
    """One of nnU-Net's checkpoints is missing, damaged or untrusted. What, what was seen, the remedy."""


class TrainingError(RuntimeError):
    """A training cannot go on, be gone on with, or be saved. What, what was seen, the remedy."""


def unwritable(error: OSError, path: Path) -> FetchError:
    """The ``FetchError`` for an operating system error met while ``path``, in the cache, was written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or set MASKSAM_CACHE to a folder on a larger disk"
    else:
        remedy = "make the folder writable or set MASKSAM_CACHE to another one"
    return FetchError(f"cannot write {path}: {reason}; {remedy}")
