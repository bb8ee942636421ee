"""``masksam export`` and ``masksam import``. Heavy imports inside the commands, as in ``cli``."""

from __future__ import annotations

import contextlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_TRAINER, Dataset, Plans, SeveralValues, Trainer, announce_trainers, fail

Format = StrEnum("Format", ["nnunet", "safetensors"])


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(cls=SeveralValues)(export)
    app.command("import")(import_)


def export(
    dataset: Dataset,
    output: Annotated[
        Path,
        typer.Option("-o", "--out", "--output", help="Zip file to write; a folder too with --format safetensors."),
    ],
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configuration", help="One or more; all that were trained if none."),
    ] = None,
    trainer: Trainer = DEFAULT_TRAINER,
    plans: Plans = "nnUNetPlans",
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--folds", help="One or more, or all.", show_default="0 1 2 3 4")
    ] = None,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="nnunet: a zip for nnU-Net's own commands, with pickled checkpoints. safetensors: one configuration "
            "as safetensors and JSON, without pickle, for masksam predict --model and masksam import.",
        ),
    ] = Format.nnunet,
    force: Annotated[
        bool, typer.Option("--force", help="With --format safetensors: replace an earlier portable model.")
    ] = False,
) -> None:
    """Export a trained model, for nnU-Net or without pickle. Lean checkpoints are completed."""
    announce_trainers()
    chosen = folds or ("0", "1", "2", "3", "4")
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints; the path alone is for pipes
        from masksam_nnunet.inference.export.write import export_model, find_model, write_portable

        if format_ is Format.safetensors:
            done = write_portable(find_model(dataset, trainer, plans, configurations), output, chosen, force)
        else:
            done = export_model(dataset, output, trainer, plans, configurations, chosen)
    typer.echo(output)
    typer.echo(f"{done.checkpoints} checkpoints, of which {done.completed} were lean and were completed", err=True)
    if format_ is Format.nnunet:
        typer.echo(f"install it with: nnUNetv2_install_pretrained_model_from_zip {output}", err=True)
        return
    if output.suffix != ".zip":
        typer.echo(f"predict with: masksam predict --model {output} -i IN -o OUT", err=True)
    typer.echo(f"install it with: masksam import {output}", err=True)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|ZIP", help="What masksam export --format safetensors wrote.")
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", envvar="nnUNet_results", help="nnU-Net's results folder to install into."),
    ] = None,
    unpack: Annotated[
        Path | None,
        typer.Option("--unpack", metavar="FOLDER", help="Instead: check a zip file and unpack it here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an installed model, all folds of it.")] = False,
) -> None:
    """Check a portable model and install it for nnU-Net's commands. Nothing of it is unpickled."""
    announce_trainers()
    if unpack is not None and force:
        raise typer.BadParameter("--unpack installs nothing: give it without --force")
    from masksam_nnunet.inference.export.install import import_model, unpack_model

    with contextlib.redirect_stdout(sys.stderr):
        if unpack is not None:
            path = unpack_model(source, unpack)
            options = f"--model {path}"
        elif to is None:
            fail("nnUNet_results is not set: export it, or name a folder to install into with --to")
        else:
            path, model = import_model(source, to, force)
            names = f"-d {model.dataset} -c {model.configuration} -tr {model.trainer} -p {model.plans}"
            options = f"{names} -f {' '.join(model.folds)}"
    typer.echo(path)
    typer.echo(f"predict with: masksam predict {options} -i IN -o OUT", err=True)
