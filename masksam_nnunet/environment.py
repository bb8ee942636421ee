"""Environment variables and file names shared by nnU-Net's processes and ours. Nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from .errors import ConfigError, UsageError

EXT_TRAINER = "nnUNet_extTrainer"
"""nnU-Net's variable: folders, joined by ``os.pathsep``, that it scans for trainer classes."""
RANDOM_INIT = "MASKSAM_RANDOM_INIT"
"""The switch for training without SAM's weights."""
LEAN_CHECKPOINTS = "MASKSAM_LEAN_CHECKPOINTS"
"""The switch for checkpoints without SAM's frozen weights."""
SLICES_AT_ONCE = "MASKSAM_SLICES_AT_ONCE"
"""How many slices SAM's frozen layers take at a time, where memory is short."""
FROZEN_BFLOAT16 = "MASKSAM_FROZEN_BFLOAT16"
"""The switch for storing the frozen linear maps of SAM's encoder in bfloat16 while a GPU trains."""
SAVE_EVERY = "MASKSAM_SAVE_EVERY"
"""How often a training saves its latest checkpoint: epochs, minutes or both, such as 10epochs,15min."""
MAX_SKIPPED = "MASKSAM_MAX_SKIPPED"
"""How many iterations in a row may have a loss or a gradient that is not finite before a training stops."""
BUDGET_MINUTES = "MASKSAM_BUDGET_MINUTES"
"""How many minutes trainers with a budget train."""
BUDGET_ITERATIONS = "MASKSAM_BUDGET_ITERATIONS"
"""How many iterations they train; set, it takes the place of the minutes."""
TESTED_NNUNET = ("2.8.0", "2.8.1")
"""Releases of nnunetv2 on which the contract tests pass."""
BUDGET_PROGRESS_FILE = "budget_progress.json"
"""Written into the fold's folder by trainers with a budget, while they train."""
TRAINING_STATS_FILE = "training_stats.json"
"""Written into the fold's folder at the end of a training."""

_ON, _OFF = ("1", "true", "t"), ("", "0", "false", "f")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU as reports name it."""
    return f"{cores()} CPU cores"


def untested_nnunet(found: str) -> str:
    """A remark on a release of nnunetv2 that the contract tests have not seen; empty for another one."""
    return "" if found in TESTED_NNUNET else f"not tested with this release, but with {', '.join(TESTED_NNUNET)}"


def switched_on(name: str) -> bool:
    """Whether the variable ``name`` is set to 1, true or t, in upper or lower case.

    Raises:
        ConfigError: it says neither that nor 0, false or f.
    """
    text = os.environ.get(name, "")
    if text.lower() not in (*_ON, *_OFF):
        raise ConfigError(f"{name} = {text!r} is not allowed: set it to 1 to switch it on, to 0 or not at all for off.")
    return text.lower() in _ON


def number_in(name: str) -> int | None:
    """The number that the variable ``name`` holds; None if it is not set.

    Raises:
        ConfigError: it holds no integer of at least 1.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} = {text!r} is not allowed: give an integer of at least 1, or unset it.")
    return int(text)


@contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for a block of code, or remove it where ``value`` is None."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def trainer_folder() -> Path:
    """The one folder that nnU-Net is to scan, wherever the package is installed.

    Raises:
        UsageError: the installation lacks the folder.
    """
    # By its spec, not by import: the trainers import nnU-Net and torch, which takes seconds.
    spec = find_spec("masksam_nnunet.trainers")
    folders = [Path(location).resolve() / "nnunet_ext" for location in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / "masksam_ext.py").is_file():
            return folder
    raise UsageError(f"masksam-nnunet is incompletely installed: no masksam_ext.py in {folders}; install it again")


def ext_trainer_value(current: str | None) -> str:
    """The value to give ``nnUNet_extTrainer``: MaskSAM's folder, then the others that ``current`` holds.

    Ours comes first so that no stale copy in another folder is found before it; applied twice, it changes nothing.
    """
    ours = trainer_folder()
    others = [entry for entry in (current or "").split(os.pathsep) if entry.strip()]
    kept = [entry for entry in dict.fromkeys(others) if Path(entry).expanduser().resolve() != ours]
    return os.pathsep.join([str(ours), *kept])
