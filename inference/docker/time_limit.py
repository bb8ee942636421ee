"""What of a model fits into the time: all of it, or without mirroring, or with fewer folds.

Mirroring goes first: it multiplies the time by up to eight, a fold by one more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

RESERVE = 0.1
"""Share of the limit that is kept for what is not measured: the container's start, a slower machine."""


class Deadline:
    """When the process must be done.

    Args:
        minutes: from the process's start; 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self.started = psutil.Process().create_time()
        self.limit = minutes * 60 if minutes else math.inf

    def passed(self) -> float:
        """Seconds since the process's start."""
        return time.time() - self.started

    def left(self) -> float:
        """Seconds that may still be used, without the reserve."""
        return self.limit * (1 - RESERVE) - self.passed()


@dataclass(frozen=True)
class Way:
    """How to predict: the first ``folds`` of the model, with ``mirrors`` inputs for each window."""

    folds: int
    mirrors: int

    def __str__(self) -> str:
        mirroring = f"{self.mirrors} mirrors" if self.mirrors > 1 else "no mirroring"
        return f"{self.folds} folds, {mirroring}" if self.folds > 1 else f"1 fold, {mirroring}"


@dataclass(frozen=True)
class Work:
    """What a case takes.

    Attributes:
        windows: of the sliding window.
        seconds: for one window of one fold, one mirror.
        writing: seconds from the network's last output to the written file.
    """

    windows: int
    seconds: float
    writing: float

    def of(self, way: Way) -> float:
        """Seconds."""
        return self.windows * way.folds * way.mirrors * self.seconds + self.writing


def ways(folds: int, mirrors: int) -> list[Way]:
    """All, best first."""
    fewer = [Way(number, 1) for number in range(folds, 0, -1)]
    return [Way(folds, mirrors), *fewer] if mirrors > 1 else fewer


def choose(work: Work, possible: Sequence[Way], left: float) -> Way:
    """The first that fits into ``left`` seconds; the last if none does."""
    return next((way for way in possible if work.of(way) <= left), possible[-1])
