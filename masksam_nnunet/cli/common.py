"""What the commands share: how they fail, what they check first, options as nnU-Net's commands take them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value

DEFAULT_TRAINER = "MaskSAMTrainer"


def fail(message: str) -> NoReturn:
    """Print the message in red on stderr, without a traceback, and exit with code 1."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def ext_trainer_or_fail() -> str:
    """The value of ``nnUNet_extTrainer`` that adds MaskSAM's trainers to those it names now."""
    try:
        return ext_trainer_value(os.environ.get(EXT_TRAINER))
    except RuntimeError as error:
        fail(str(error))


def require_device(device: str) -> None:
    """Fail where ``-device`` is cuda, nnU-Net's default, and PyTorch sees no GPU."""
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        fail(f"-device cuda: PyTorch {torch.__version__} sees no GPU here; use a machine with one, or -device cpu")


class SeveralValues(TyperCommand):
    """Options that may be repeated also take several values at once, as nnU-Net's do: ``-f 0 1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeat_options(args, repeatable, self.takes))

    def takes(self, option: str, word: str) -> bool:
        """Whether ``word``, after a first value of ``option``, is one more."""
        return True


def repeat_options(
    arguments: list[str], repeatable: set[str], takes: Callable[[str, str], bool] = lambda option, word: True
) -> list[str]:
    """Write ``-f 0 1`` as ``-f 0 -f 1``, for the options in ``repeatable`` and the words that they take."""
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
