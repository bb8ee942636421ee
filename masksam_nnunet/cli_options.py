"""Options as nnU-Net's commands take them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """Options that may be repeated take several values at once too, as nnU-Net's do: ``-f 0 1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeat_options(args, repeatable))


def repeat_options(arguments: list[str], repeatable: set[str]) -> list[str]:
    """``-f 0 1`` as ``-f 0 -f 1``, for the options in ``repeatable``."""
    result: list[str] = []
    option, taken = "", False
    for word in arguments:
        if word.startswith("-"):
            option, taken = word, False
        elif option in repeatable and taken:
            result.append(option)
        else:
            taken = True
        result.append(word)
    return result
