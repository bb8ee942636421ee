"""Progress of a benchmark: one line for each fold that trains, and the total."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from masksam_nnunet.environment import BUDGET_PROGRESS_FILE
from masksam_nnunet.files import read_json

from .folds import FINAL
from .jobs import FoldJob, Status

TRAINING_SHARE = 0.95
"""Of a fold's bar; the rest is validation."""
PLAIN_SECONDS = 60.0
"""How often a line is printed for each fold that trains where there is no terminal."""
_TAIL_BYTES = 20_000


def fold_progress(job: FoldJob) -> tuple[float, str]:
    """How far a running fold is, from 0 to 1 and as text, judged by the files in its folder."""
    if (job.folder / FINAL).is_file():
        endings = (".json", ".npz", ".pkl")
        predicted = sum(1 for path in (job.folder / "validation").glob("*") if path.suffix not in endings)
        try:
            number = len(job.cases)
        except (OSError, ValueError, LookupError, TypeError):  # damaged meanwhile; the job itself will say so
            return TRAINING_SHARE, f"validation, {predicted} cases"
        share = min(1.0, predicted / max(1, number))
        return TRAINING_SHARE + (1 - TRAINING_SHARE) * share, f"validation, {predicted} of {number} cases"
    try:  # a time-budget trainer
        state = read_json(job.folder / BUDGET_PROGRESS_FILE)
        return TRAINING_SHARE * min(1.0, float(state["fraction"])), f"{state['iterations']} iterations"
    except (OSError, ValueError, KeyError, TypeError):
        epoch = _latest_epoch(job)
    if epoch is None:
        return 0.0, "starting"
    try:  # nnU-Net writes its trainer's attributes there, as text
        planned = int(read_json(job.folder / "debug.json")["num_epochs"])
        return TRAINING_SHARE * min(1.0, epoch / planned), f"epoch {epoch + 1} of {planned}"
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0, f"epoch {epoch + 1}"


def _latest_epoch(job: FoldJob) -> int | None:
    try:
        with job.log.open("rb") as stream:
            stream.seek(max(0, job.log.stat().st_size - _TAIL_BYTES))
            found = re.findall(rb"\bEpoch (\d+)\b", stream.read())
    except OSError:
        return None
    return int(found[-1]) if found else None


class Progress(RichProgress):
    """Shows a benchmark with bars on a terminal, with plain lines elsewhere; ``show`` is the jobs' watch."""

    def __init__(self, console: Console, jobs: Sequence[FoldJob]) -> None:
        """Args: where to show it, and the jobs that will run."""
        super().__init__(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._jobs = {job.name: job for job in jobs}
        self._before: Mapping[str, Status] = {}
        self._last_lines = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        self._total = self.add_task("all folds", total=max(1, len(jobs)), detail="")

    def show(self, statuses: Mapping[str, Status]) -> None:
        """Take over the status of each job, by name."""
        running = {name: fold_progress(self._jobs[name]) for name, status in statuses.items() if status == "running"}
        ended = sum(status in ("done", "failed") for status in statuses.values())
        for name, status in statuses.items():
            if status != self._before.get(name, "waiting"):
                count = f" ({ended} of {len(self._jobs)} folds have ended)" if status in ("done", "failed") else ""
                self._print(f"{name}: {status}{count}")
        for name in self._bars.keys() - running.keys():
            self.remove_task(self._bars.pop(name))
        for name, (fraction, text) in running.items():
            if name not in self._bars:
                self._bars[name] = self.add_task(f"  {name}", total=1.0, detail="")
            self.update(self._bars[name], completed=fraction, detail=text)
        done = ended + sum(fraction for fraction, _ in running.values())
        self.update(self._total, completed=done, detail=f"{ended} of {len(self._jobs)} folds")
        if self.disable and time.monotonic() - self._last_lines > PLAIN_SECONDS:
            self._last_lines = time.monotonic()
            for name, (fraction, text) in running.items():
                self._print(f"{name}: {fraction:.0%}, {text}")
        self._before = dict(statuses)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
