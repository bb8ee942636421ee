"""Where a long name, of a trainer for instance, may go on in the next line."""

from __future__ import annotations

import re

_BREAK = re.compile(r"(?<=[\s_])(?=[^\s_])|(?<=[a-z])(?=[A-Z])")


def pieces(name: str, longest: int) -> list[str]:
    """``name`` cut after spaces and underscores, before capitals, and wherever it would be longer than ``longest``."""
    return [token[start : start + longest] for token in _BREAK.split(name) for start in range(0, len(token), longest)]
