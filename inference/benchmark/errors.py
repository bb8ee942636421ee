"""What goes wrong in a benchmark and the user can mend."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """Names what is wrong, where, and the remedy; shown without a traceback."""
