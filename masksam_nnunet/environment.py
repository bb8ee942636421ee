"""How nnU-Net's processes and ours speak: variables, file names, the folder of trainers. Standard library only."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

EXT_TRAINER = "nnUNet_extTrainer"
"""nnU-Net's variable: folders, joined by ``os.pathsep``, that it scans for trainer classes."""
BUDGET_MINUTES = "MASKSAM_BUDGET_MINUTES"
"""The variable that tells time-budget trainers how long to train."""
BUDGET_PROGRESS_FILE = "budget_progress.json"
TRAINING_STATS_FILE = "training_stats.json"
"""What they write into the fold's folder, while they train and at the end."""


def trainer_folder() -> Path:
    """The one folder that nnU-Net is to scan, wherever the package is installed.

    Raises:
        RuntimeError: the installation lacks the folder.
    """
    # By its spec, not by import: the trainers import nnU-Net and torch, which takes seconds.
    spec = find_spec("masksam_nnunet.trainers")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(locations[0]) / "nnunet_ext" if locations else None
    if folder is None or not (folder / "masksam_ext.py").is_file():
        raise RuntimeError(
            f"masksam-nnunet is incompletely installed: no masksam_ext.py in {folder or 'its trainers package'}; "
            "install the package again"
        )
    return folder.resolve()


def ext_trainer_value(current: str | None) -> str:
    """The value to give ``nnUNet_extTrainer``: MaskSAM's folder, then the others that ``current`` holds.

    Ours comes first so that no stale copy in another folder is found before it; applied twice, it changes nothing.
    """
    ours = trainer_folder()
    others = [entry for entry in (current or "").split(os.pathsep) if entry.strip()]
    kept = [entry for entry in dict.fromkeys(others) if Path(entry).expanduser().resolve() != ours]
    return os.pathsep.join([str(ours), *kept])
