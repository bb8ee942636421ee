"""Progress of the whole grid: one line for each fold under way, and the total."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import TaskID

from masksam_nnunet.environment import BUDGET_PROGRESS_FILE
from masksam_nnunet.files import read_json

from .bars import Bars
from .executors import Status
from .fold_record import PROCESS_FILE
from .fold_state import FINAL
from .train_fold import FoldJob

TRAINING_SHARE = 0.95
"""Of a fold's bar; the rest is validation."""
PLAIN_SECONDS = 60.0
"""How often a line is printed for each fold under way where there is no terminal."""
_TAIL_BYTES = 20_000
_EPOCH = re.compile(r"\bEpoch (\d+)\b")


@dataclass(frozen=True)
class FoldProgress:
    """How far a fold is, from 0 to 1, and in words."""

    fraction: float
    text: str


def fold_progress(job: FoldJob) -> FoldProgress:
    """How far a fold under way is, by what its folder holds."""
    if (job.folder / FINAL).is_file():
        endings = (".json", ".npz", ".pkl")
        predicted = sum(1 for path in (job.folder / "validation").glob("*") if path.suffix not in endings)
        try:
            number = max(1, len(job.cases))
        except (OSError, ValueError, LookupError, TypeError):  # being written anew; the job itself will say so
            return FoldProgress(TRAINING_SHARE, f"validation, {predicted} cases")
        share = TRAINING_SHARE + (1 - TRAINING_SHARE) * min(1.0, predicted / number)
        return FoldProgress(share, f"validation, {predicted} of {number} cases")
    try:
        state = read_json(job.folder / BUDGET_PROGRESS_FILE)
        fraction = min(1.0, float(state["fraction"]))
        return FoldProgress(TRAINING_SHARE * fraction, f"{state['iterations']} iterations")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no time-budget trainer, or not there yet
    epoch = _last_epoch(job)
    try:
        planned = int(read_json(job.folder / PROCESS_FILE)["epochs_planned"])
    except (OSError, ValueError, KeyError, TypeError):
        planned = 0
    if epoch is None:
        return FoldProgress(0.0, "starting")
    if not planned:
        return FoldProgress(0.0, f"epoch {epoch + 1}")
    return FoldProgress(TRAINING_SHARE * min(1.0, epoch / planned), f"epoch {epoch + 1} of {planned}")


def _last_epoch(job: FoldJob) -> int | None:
    try:
        with job.log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            found = _EPOCH.findall(stream.read().decode("utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[-1]) if found else None


class GridProgress(Bars):
    """Shows the grid on a terminal with bars, elsewhere with plain lines; an executor's ``watch`` is :meth:`show`."""

    def __init__(self, console: Console, jobs: Sequence[FoldJob]) -> None:
        """Args: where to show it, and what will run."""
        super().__init__(console, width=24, hidden=not console.is_terminal)
        self._jobs = {job.name: job for job in jobs}
        self._before: Mapping[str, Status] = {}
        self._last_lines = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        self._whole = self._progress.add_task("all folds", total=max(1, len(jobs)), detail="")

    def show(self, statuses: Mapping[str, Status]) -> None:
        """Take over where each job is, by name."""
        under_way = {name: fold_progress(self._jobs[name]) for name, s in statuses.items() if s is Status.RUNNING}
        ended = [name for name, status in statuses.items() if status in (Status.DONE, Status.FAILED)]
        for name in statuses:
            if statuses[name] is not self._before.get(name, Status.WAITING):
                self._tell(name, statuses[name], len(ended))
        self._draw(under_way, ended)
        if not self.console.is_terminal and time.monotonic() - self._last_lines > PLAIN_SECONDS:
            self._last_lines = time.monotonic()
            for name, progress in under_way.items():
                self._print(f"{name}: {progress.fraction:.0%}, {progress.text}")
        self._before = dict(statuses)

    def _tell(self, name: str, status: Status, ended: int) -> None:
        count = f" ({ended} of {len(self._jobs)} folds have ended)" if status in (Status.DONE, Status.FAILED) else ""
        self._print(f"{name}: {status.value}{count}")

    def _draw(self, under_way: Mapping[str, FoldProgress], ended: Sequence[str]) -> None:
        for name, progress in under_way.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(f"  {name}", total=1.0, detail="")
            self._progress.update(self._bars[name], completed=progress.fraction, detail=progress.text)
        for name in [name for name in self._bars if name not in under_way]:
            self._progress.remove_task(self._bars.pop(name))
        done = len(ended) + sum(progress.fraction for progress in under_way.values())
        self._progress.update(self._whole, completed=done, detail=f"{len(ended)} of {len(self._jobs)} folds")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
