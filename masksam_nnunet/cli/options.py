"""Options as nnU-Net's commands take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """Options that may be repeated take several values at once too, as nnU-Net's do: ``-f 0 1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeat_options(args, repeatable, self.takes))

    def takes(self, option: str, word: str) -> bool:
        """Whether ``word``, after a first value of ``option``, is one more."""
        return True


def repeat_options(
    arguments: list[str], repeatable: set[str], takes: Callable[[str, str], bool] = lambda option, word: True
) -> list[str]:
    """``-f 0 1`` as ``-f 0 -f 1``, for the options in ``repeatable`` and the words that they take."""
    result: list[str] = []
    option, taken = "", False
    for word in arguments:
        if word.startswith("-"):
            option, taken = word, False
        elif option in repeatable and taken:
            if takes(option, word):
                result.append(option)
            else:
                option = ""
        else:
            taken = True
        result.append(word)
    return result
