"""Where a long name, of a trainer for instance, may go on in the next line."""

from __future__ import annotations

import re

_WORDS = re.compile(r"(?<=[\s_])(?=[^\s_])")
_HUMPS = re.compile(r"(?<=[a-z])(?<!\bnn)(?=[A-Z])")  # nnUNet stays whole
_WHOLE = 16  # characters that need no cut at capitals


def pieces(name: str, longest: int) -> list[str]:
    """``name`` cut after spaces and underscores.

    What is still long is cut before capitals, and what is longer than ``longest`` anywhere.
    """
    words = _WORDS.split(name)
    tokens = [token for word in words for token in (_HUMPS.split(word) if len(word) > _WHOLE else [word])]
    return [token[start : start + longest] for token in tokens for start in range(0, len(token), longest)]
