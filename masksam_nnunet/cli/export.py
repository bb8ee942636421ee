"""``masksam export`` and ``masksam import``. Heavy imports inside the commands, as in ``cli``."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import MaskSAMError

from .common import SeveralValues, ext_trainer_or_fail, fail


class Format(StrEnum):
    """What an exported model is made of."""

    nnunet = "nnunet"
    safetensors = "safetensors"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(cls=SeveralValues)(export)
    app.command("import")(import_)


def export(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The zip file to write; with --format safetensors a folder, or a zip file of it.",
            show_default=False,
        ),
    ],
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configuration", help="One or more; all that were trained if none.", show_default=False),
    ] = None,
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="The trainer's class.")] = "MaskSAMTrainer",
    plans: Annotated[str, typer.Option("-p", "--plans", help="Name of the plans.")] = "nnUNetPlans",
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
    """Export a trained model, for nnU-Net or without pickle; lean checkpoints are made full."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()

    chosen = {"folds": folds} if folds else {}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net talks; the path alone is for pipes
            if format_ is Format.safetensors:
                from masksam_nnunet.inference.export.write import export_portable

                portable = export_portable(dataset, output, trainer, plans, configurations, force=force, **chosen)
                path = portable.output
                said = (
                    f"{len(portable.folds)} folds, {portable.total_bytes / 1e6:.1f} MB, of which "
                    f"{portable.shared_bytes / 1e6:.1f} MB are shared by all of them; {portable.completed} checkpoints "
                    f"were lean and were completed\n"
                    + ("" if path.suffix == ".zip" else f"predict with: masksam predict --model {path} -i IN -o OUT\n")
                    + f"install it with: masksam import {path}"
                )
            else:
                from masksam_nnunet.inference.export.nnunet_zip import export_model

                done = export_model(dataset, output, trainer, plans, configurations, **chosen)
                path = done.file
                said = (
                    f"{done.checkpoints} checkpoints, of which {done.completed} were lean and were completed\n"
                    f"install it with: nnUNetv2_install_pretrained_model_from_zip {done.file.name}"
                )
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(path)
    typer.echo(said, err=True)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|ZIP", help="What masksam export --format safetensors wrote.")
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="nnU-Net's results folder to install into.", show_default="nnUNet_results"),
    ] = None,
    unpack: Annotated[
        Path | None,
        typer.Option(
            "--unpack",
            metavar="FOLDER",
            help="Instead: check a zip file and unpack it here, for masksam predict --model.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an installed model, all folds of it.")] = False,
) -> None:
    """Check a portable model and install it for nnU-Net's commands. Nothing of it is unpickled."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    results = to or Path(os.environ.get("nnUNet_results", ""))
    if unpack is not None and (to is not None or force):
        raise typer.BadParameter("--unpack installs nothing: give it without --to and --force")
    if unpack is None and to is None and not os.environ.get("nnUNet_results"):
        fail("nnUNet_results not set: models are installed there; export it first, or name a folder with --to")
    from masksam_nnunet.inference.export.install import import_model, unpack_model

    try:
        with contextlib.redirect_stdout(sys.stderr):
            if unpack is not None:
                path, said = (
                    unpack_model(source, unpack),
                    f"predict with: masksam predict --model {unpack} -i IN -o OUT",
                )
            else:
                done = import_model(source, results, force)
                path = done.folder
                said = (
                    f"predict with: masksam predict -d {done.dataset} -c {done.configuration} -tr {done.trainer} "
                    f"-p {done.plans} -f {' '.join(done.folds)} -i IN -o OUT"
                )
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(path)
    typer.echo(said, err=True)
