"""Work on many files at once, with a bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_threads(function: Callable[[_In], _Out], items: Sequence[_In], what: str | None = None) -> list[_Out]:
    """``function`` of each item, in order; a bar named ``what``, if it has a name, on a terminal's stderr.

    Threads: decompression and NumPy leave the interpreter's lock. Few: each may hold a volume.
    """
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        return list(
            track(results, what or "", len(items), console=console, disable=what is None or not console.is_terminal)
        )
