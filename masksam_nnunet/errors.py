"""Every error that a user can act on: what is wrong, the value received, the remedy."""

from __future__ import annotations


class MaskSAMError(Exception):
    """Base of all errors of this package. Commands print its message without a traceback."""


class UsageError(MaskSAMError):
    """An option, or a file or folder that an option names, cannot be used."""


class DataError(MaskSAMError):
    """A dataset, image, label map, split or plans file is missing, damaged or inconsistent."""


class ConfigError(MaskSAMError, ValueError):
    """An option of a config or an environment variable has a value that is not allowed."""


class TrainingError(MaskSAMError):
    """A training cannot start, continue or be saved."""


class WeightsError(MaskSAMError):
    """SAM's weights are missing, damaged, untrusted or do not fit."""


class CheckpointError(MaskSAMError):
    """The checkpoint file of a trained fold is missing, damaged or untrusted."""


class ModelError(DataError):
    """A trained model is missing, incomplete or damaged."""


class CaseError(MaskSAMError):
    """One case cannot be predicted; the message names the file, what is wrong with it, and the remedy."""


def in_short(error: BaseException) -> str:
    """What a library's error says, in one line with its kind."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[-300:]}" if words else type(error).__name__
