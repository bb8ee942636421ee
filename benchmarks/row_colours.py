"""The colour and line of each row in every plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from masksam_nnunet.inference.report.figures import LINE_STYLES

from .plots import METHOD_COLOURS
from .results import Method, Row


@dataclass(frozen=True)
class Look:
    """Of one row; ``line`` differs where colours repeat."""

    colour: str
    line: str


def looks(rows: Sequence[Row]) -> Mapping[str, Look]:
    """By the name of the row; a row with post-processing looks like the one without."""
    members: list[tuple[Method, ...]] = list(dict.fromkeys(row.members for row in rows))
    found = {}
    for row in rows:
        place = members.index(row.members)
        line = LINE_STYLES[place // len(METHOD_COLOURS) % len(LINE_STYLES)]
        found[row.name] = Look(METHOD_COLOURS[place % len(METHOD_COLOURS)], line)
    return found
