"""``masksam export``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.cli_fail import ext_trainer_or_fail, fail
from masksam_nnunet.cli_options import SeveralValues
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import WeightsError


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=SeveralValues)(export)


def export(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zip file to write.", show_default=False)],
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configuration", help="One or more; all that were trained if none.", show_default=False),
    ] = None,
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="The trainer's class.")] = "MaskSAMTrainer",
    plans: Annotated[str, typer.Option("-p", "--plans", help="Name of the plans.")] = "nnUNetPlans",
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--folds", help="One or more, or all.", show_default="0 1 2 3 4")
    ] = None,
) -> None:
    """Export a trained model as a zip that nnU-Net installs anywhere; lean checkpoints are made full."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    from masksam_nnunet.inference.export import export_model
    from masksam_nnunet.plans.errors import PlanError

    chosen = {"folds": folds} if folds else {}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net talks; the path alone is for pipes
            done = export_model(dataset, output, trainer, plans, configurations, **chosen)
    except (PlanError, WeightsError) as error:
        fail(str(error))
    typer.echo(done.file)
    typer.echo(
        f"{done.checkpoints} checkpoints, of which {done.completed} were lean and were completed\n"
        f"install it with: nnUNetv2_install_pretrained_model_from_zip {done.file.name}",
        err=True,
    )
