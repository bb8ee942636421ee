"""Names for messages."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted; ``none`` where there are none."""
    return ", ".join(sorted(names)) or "none"
