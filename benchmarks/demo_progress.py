"""Progress bars of the demo: one for the whole, one for each training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TaskID

from .bars import Bars


class DemoProgress(Bars):
    """Shows where the demo is; on a terminal with bars, elsewhere with a line per step."""

    def __init__(self, console: Console, steps: Mapping[str, float]) -> None:
        """Args: a console, and the steps in their order with the seconds each may take, for the bar of the whole."""
        super().__init__(console, width=28)
        self._steps = dict(steps)
        self._done = 0.0
        self._whole = self._progress.add_task("the whole demo", total=sum(self._steps.values()), detail="")

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Announce a step, and count it as done when it ends without an error."""
        number = list(self._steps).index(name) + 1
        self.console.print(f"[bold]{number}/{len(self._steps)}[/] {text}", highlight=False)
        self._progress.update(self._whole, detail=name)
        yield
        self._done += self._steps[name]
        self._progress.update(self._whole, completed=self._done, detail="")

    def reused(self, text: str) -> None:
        """Say that an earlier run's work is taken over."""
        self.console.print(f"    already there from an earlier run: {text}", highlight=False)

    def add_bar(self, text: str) -> TaskID:
        """A bar of its own for a step."""
        return self._progress.add_task(text, total=1.0, detail="starting")

    def advance(self, bar: TaskID, name: str, fraction: float, detail: str) -> None:
        """Move a step's bar, and the whole's with it."""
        self._progress.update(bar, completed=fraction, detail=detail)
        self._progress.update(self._whole, completed=self._done + self._steps[name] * fraction)

    def close_bar(self, bar: TaskID, detail: str) -> None:
        """Fill a step's bar and stop its clock."""
        self._progress.update(bar, completed=1.0, detail=detail)
        self._progress.stop_task(bar)
