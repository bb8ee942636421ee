"""Progress of a benchmark: one line for each fold that trains, and the total."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from masksam_nnunet.environment import BUDGET_PROGRESS_FILE
from masksam_nnunet.files import read_json

from .folds import FINAL
from .jobs import FoldJob, Status

TRAINING_SHARE = 0.95
"""Share of the training in a fold's bar; the rest is validation."""
_TAIL_BYTES = 20_000


def fold_progress(job: FoldJob) -> tuple[float, str]:
    """How far a running fold is, from 0 to 1 and as text, judged by the files in its folder."""
    if (job.folder / FINAL).is_file():
        endings = (".json", ".npz", ".pkl")
        predicted = sum(1 for path in (job.folder / "validation").glob("*") if path.suffix not in endings)
        with suppress(OSError, ValueError, LookupError, TypeError):  # damaged meanwhile; the job itself will say so
            share, number = predicted / len(job.cases), len(job.cases)
            return TRAINING_SHARE + (1 - TRAINING_SHARE) * share, f"validation, {predicted} of {number} cases"
        return TRAINING_SHARE, f"validation, {predicted} cases"
    with suppress(OSError, ValueError, KeyError, TypeError):  # a time-budget trainer
        state = read_json(job.folder / BUDGET_PROGRESS_FILE)
        return TRAINING_SHARE * min(1.0, float(state["fraction"])), f"{state['iterations']} iterations"
    epoch = 0
    with suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError, IndexError):
        with job.log.open("rb") as stream:
            stream.seek(max(0, job.log.stat().st_size - _TAIL_BYTES))
            epoch = int(re.findall(rb"\bEpoch (\d+)\b", stream.read())[-1]) + 1
        planned = int(read_json(job.folder / "debug.json")["num_epochs"])  # nnU-Net's trainer's attributes, as text
        return TRAINING_SHARE * min(1.0, (epoch - 1) / planned), f"epoch {epoch} of {planned}"
    return 0.0, f"epoch {epoch}" if epoch else "starting"


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
        self._bars: dict[str, TaskID] = {}
        self._total = self.add_task("all folds", total=max(1, len(jobs)), detail="")

    def show(self, statuses: Mapping[str, Status]) -> None:
        """Take over the status of each job, by name."""
        running = {name: fold_progress(self._jobs[name]) for name, status in statuses.items() if status == "running"}
        ended = sum(status in ("done", "failed") for status in statuses.values())
        for name, status in statuses.items():
            if status != self._before.get(name, "waiting"):
                count = f" ({ended} of {len(self._jobs)} folds have ended)" if status in ("done", "failed") else ""
                self.console.print(f"{name}: {status}{count}", markup=False, highlight=False, soft_wrap=True)
        for name in self._bars.keys() - running.keys():
            self.remove_task(self._bars.pop(name))
        for name, (fraction, text) in running.items():
            if name not in self._bars:
                self._bars[name] = self.add_task(f"  {name}", total=1.0, detail="")
            self.update(self._bars[name], completed=fraction, detail=text)
        done = ended + sum(fraction for fraction, _ in running.values())
        self.update(self._total, completed=done, detail=f"{ended} of {len(self._jobs)} folds")
        self._before = dict(statuses)
