"""How far a fold has come, told from its folder alone."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from masksam_nnunet.checkpoints import damage
from masksam_nnunet.files import read_json

_TRAINED, _VALIDATED = "Training done.", "Validation complete"
FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"


class Stage(Enum):
    """How far a fold has come."""

    MISSING = "missing"
    """Nothing to go on from."""
    BROKEN_OFF = "broken off"
    """A whole checkpoint_latest or checkpoint_best to go on from."""
    TRAINED = "trained"
    """The final checkpoint is there, the validation is not complete."""
    DONE = "done"
    """Trained, and every validation case predicted and scored."""
    DAMAGED = "damaged"
    """The checkpoint to go on from is not a whole file."""


@dataclass(frozen=True)
class FoldState:
    """A stage, and in words what it was told from."""

    stage: Stage
    reason: str


def fold_state(folder: Path, cases: Sequence[str], file_ending: str, npz: bool) -> FoldState:
    """How far a fold has come.

    Args:
        folder: of the fold; need not exist.
        cases: the fold's validation cases.
        file_ending: of predictions, such as ``.nii.gz``.
        npz: whether probabilities are wanted too.
    """
    final = folder / FINAL
    if not final.is_file():
        return _before_the_end(folder)
    lacking = _lacking(folder / "validation", cases, file_ending, npz) or _outdated(folder)
    # All its bytes only where it will be read: a large model's folds take long.
    wrong = damage(final, thorough=lacking is not None)
    if wrong is not None:
        earlier = [name for name in (LATEST, BEST) if (folder / name).is_file() and not damage(folder / name)]
        remedy = f"remove the folder {folder} to train this fold again"
        if earlier:  # nnU-Net removes the latest only after it has written the final one
            remedy = f"remove that file alone: training then goes on from {earlier[0]}"
        return FoldState(
            Stage.DAMAGED, f"{final} is not a whole checkpoint ({wrong}); {remedy}, or put a whole copy there"
        )
    if lacking is not None:
        return FoldState(Stage.TRAINED, lacking)
    return FoldState(Stage.DONE, f"{len(cases)} validation cases predicted and scored")


def _before_the_end(folder: Path) -> FoldState:
    """nnU-Net's ``--c`` takes the latest checkpoint, else the best."""
    for name, other in ((LATEST, BEST), (BEST, None)):
        file = folder / name
        if not file.is_file():
            continue
        wrong = damage(file)
        if wrong is None:
            return FoldState(Stage.BROKEN_OFF, f"{name} is there")
        remedy = "training then starts again from nothing"
        if other is not None and (folder / other).is_file():
            remedy = f"training then goes on from {other}"
        return FoldState(
            Stage.DAMAGED, f"{file} is not a whole checkpoint ({wrong}); remove it and run again: {remedy}"
        )
    return FoldState(Stage.MISSING, "there is no checkpoint")


def _lacking(validation: Path, cases: Sequence[str], file_ending: str, npz: bool) -> str | None:
    """What a validation lacks, in words; None if nothing."""
    endings = (file_ending, ".npz", ".pkl") if npz else (file_ending,)
    for ending in endings:
        missing = [case for case in cases if not _is_whole(validation / f"{case}{ending}")]
        if missing:
            return f"{len(missing)} of {len(cases)} validation cases lack a whole {ending} file, such as {missing[0]}"
    summary = validation / "summary.json"
    try:
        scored = read_json(summary)["metric_per_case"]
        names = {Path(entry["prediction_file"]).name for entry in scored}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{summary} is not there or not whole"
    unscored = [case for case in cases if f"{case}{file_ending}" not in names]
    return f"{summary} lacks {len(unscored)} of {len(cases)} cases" if unscored else None


def _outdated(folder: Path) -> str | None:
    """Whether predictions are older than the checkpoint: of an earlier training of the same fold.

    nnU-Net's logs tell, in the order of their starts; files' times only where there are none, since copies have others.
    """
    told = [line for file in training_logs(folder) for line in _ends(file)]
    if _TRAINED in told:
        if told[-1] == _VALIDATED:
            return None
        return "nnU-Net's log has no complete validation after the training: its predictions are an earlier one's"
    scored, trained = (file.stat().st_mtime_ns for file in (folder / "validation" / "summary.json", folder / FINAL))
    return f"its predictions are older than {FINAL}" if scored < trained else None


def training_logs(folder: Path) -> list[Path]:
    """nnU-Net's logs of a fold, one for each start, the earliest first."""
    # Numbers without leading zeros for month and day: not in the order of their letters.
    return sorted(folder.glob("training_log_*.txt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])


def _ends(log: Path) -> list[str]:
    """Ends of training and validation, in the order of the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return re.findall(rf"^[\d\-]+ [\d:.]+: ({re.escape(_TRAINED)}|{re.escape(_VALIDATED)})\s*$", text, re.MULTILINE)


def _is_whole(file: Path) -> bool:
    """Whether a file is there and ends as its kind must; cheap, so that a cut label map passes until it is scored."""
    if not file.is_file() or not file.stat().st_size:
        return False
    if file.suffix == ".npz":
        return zipfile.is_zipfile(file)
    if file.suffix == ".pkl":
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read() == pickle.STOP
    return True
