"""How a command ends with an error that the user can mend."""

from __future__ import annotations

import os
from typing import NoReturn

import typer

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value


def fail(message: str) -> NoReturn:
    """The message in red on stderr, no traceback, exit code 1."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def ext_trainer_or_fail() -> str:
    """The value to give ``nnUNet_extTrainer`` beside what it holds."""
    try:
        return ext_trainer_value(os.environ.get(EXT_TRAINER))
    except RuntimeError as error:
        fail(str(error))
