"""What goes wrong in a benchmark and the user can mend."""

from __future__ import annotations

from collections.abc import Iterable


class BenchmarkError(RuntimeError):
    """Names what is wrong, where, and the remedy; shown without a traceback."""


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted; ``none`` where there are none."""
    return ", ".join(sorted(names)) or "none"
