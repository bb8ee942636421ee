"""What the demo's and the benchmark's progress bars share."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bars:
    """Bars with a description, a share, the time and a detail (a task's field ``detail``); a context draws them."""

    def __init__(self, console: Console, width: int, hidden: bool = False) -> None:
        """Args: a console, the bars' width, and whether to draw none."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=width),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
            disable=hidden,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; what was drawn stays."""
        self._progress.stop()
