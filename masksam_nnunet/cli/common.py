"""What the commands share: how they fail, what they check first, options as nnU-Net's commands take them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import MaskSAMError

DEFAULT_TRAINER = "MaskSAMTrainer"

Dataset = Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.")]
NewDataset = Annotated[int, typer.Option("-d", "--dataset", min=1, max=999, help="Number of the new dataset.")]
Trainer = Annotated[str, typer.Option("-tr", "--trainer", help="The trainer's class.")]
Plans = Annotated[str, typer.Option("-p", "--plans", help="Name of the plans.")]
Checkpoint = Annotated[str, typer.Option("-chk", "--checkpoint", help="File name of the checkpoints.")]
PreviousStage = Annotated[
    Path | None,
    typer.Option(
        "-prev_stage_predictions",
        "--prev-stage-predictions",
        help="For a cascade: folder of the first stage's label maps.",
    ),
]


class Commands(TyperGroup):
    """Commands whose errors are shown as a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MaskSAMError as error:
            fail(str(error))
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def fail(message: str) -> NoReturn:
    """Print the message in red on stderr, without a traceback, and exit with code 1."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def announce_trainers() -> None:
    """Let nnU-Net find MaskSAM's trainers, in the processes that it starts too."""
    os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))


class SeveralValues(TyperCommand):
    """Options that may be repeated also take several values at once, as nnU-Net's do: ``-f 0 1`` is ``-f 0 -f 1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        result: list[str] = []
        option, taken = "", False
        for word in args:
            if word.startswith("-"):
                option, taken = word, False
            elif option in repeatable and taken:
                if self.takes(option, word):
                    result.append(option)
                else:
                    option = ""
            else:
                taken = True
            result.append(word)
        return super().parse_args(ctx, result)

    def takes(self, option: str, word: str) -> bool:
        """Whether ``word``, after a first value of ``option``, is one more."""
        return True
