"""Which slices to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksam_nnunet.errors import ExplainError

from .volume import Volume

AUTO = 4
MOST = 24


def read_slices(words: Sequence[str]) -> list[int] | None:
    """The value of ``--slices``: numbers in rising order, or None for ``auto`` and for nothing.

    Raises:
        ExplainError: something else, or too many.
    """
    if not words or list(words) == ["auto"]:
        return None
    wrong = [word for word in words if not (word.isascii() and word.isdecimal())]
    if wrong:
        raise ExplainError(f"--slices {' '.join(words)}: {wrong[0]!r} is no slice; give numbers from 0, or auto")
    numbers = sorted({int(word) for word in words})
    if len(numbers) > MOST:
        raise ExplainError(f"--slices: {len(numbers)} slices; a page shows at most {MOST}: name fewer")
    return numbers


def check_slices(wanted: Sequence[int], volume: Volume) -> None:
    """Refuse slices that the source has not, or that the network never sees.

    Raises:
        ExplainError: naming them and the range.
    """
    kept = volume.kept
    beyond = [index for index in wanted if index >= volume.source_slices]
    empty = [index for index in wanted if index not in kept]
    if beyond:
        raise ExplainError(
            f"--slices {' '.join(map(str, beyond))}: the image has {volume.source_slices} slices along its axis "
            f"{volume.slice_axis}, counted from 0: name some of 0 to {volume.source_slices - 1}"
        )
    if empty:
        raise ExplainError(
            f"--slices {' '.join(map(str, empty))}: all zero, so that nnU-Net cuts them off and the network never sees "
            f"them; name some of {kept.start} to {kept.stop - 1}"
        )


def choose_slices(
    foreground: NDArray[np.integer[Any]], entropy: NDArray[np.floating[Any]], count: int = AUTO
) -> list[int]:
    """Slices with much foreground and much uncertainty, spread over the object.

    One of each of ``count`` stretches of it, none beside another where the stretches leave the choice.

    Args:
        foreground: (S,) voxels of foreground in each slice.
        entropy: (S,) uncertainty of each slice, summed up.
        count: how many; fewer where there are fewer slices.
    """
    candidates = np.flatnonzero(foreground) if foreground.any() else np.arange(len(foreground))
    score = np.zeros(len(foreground))
    for values in (foreground, entropy):
        if values.max() > 0:
            score += values / values.max()
    stretches = np.array_split(candidates, min(count, len(candidates)))
    chosen: list[int] = []
    for stretch in stretches:
        # At least half a stretch after the one before.
        free = stretch[stretch >= chosen[-1] + max(1, len(stretch) / 2)] if chosen else stretch
        chosen.append(int(free[np.argmax(score[free])]))
    return chosen
