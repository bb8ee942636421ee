"""``masksam explain``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT_TRAINER,
    Checkpoint,
    Dataset,
    Plans,
    PreviousStage,
    SeveralValues,
    Trainer,
    announce_trainers,
)


class _CaseAnywhere(SeveralValues):
    """A word that cannot be a further value of an option is the case: ``-f 0 CASE``."""

    def takes(self, option: str, word: str) -> bool:
        if option in ("-f", "--folds", "--slices"):
            return word.isdecimal() or word in ("all", "auto")
        return "." in word  # --image: files have endings


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=_CaseAnywhere)(explain)


def explain(
    dataset: Dataset,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="nnU-Net's configuration.")],
    case: Annotated[
        str | None,
        typer.Argument(help="A case of the raw dataset; with --image any name."),
    ] = None,
    trainer: Trainer = DEFAULT_TRAINER,
    plans: Plans = "nnUNetPlans",
    folds: Annotated[
        list[str] | None,
        typer.Option(
            "-f",
            "--folds",
            help="Fold numbers, or all; queries are the first one's.",
            show_default="0",
        ),
    ] = None,
    checkpoint: Checkpoint = "checkpoint_final.pth",
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Files, one per channel, of an image outside the dataset."),
    ] = None,
    label: Annotated[
        Path | None, typer.Option("--label", help="The label map to show.", show_default="the dataset's own")
    ] = None,
    previous: PreviousStage = None,
    slices: Annotated[
        list[str] | None, typer.Option("--slices", help="Slice numbers in the image, from 0.", show_default="auto")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write.", show_default="explain_CASE")
    ] = None,
    device: Annotated[
        str | None, typer.Option("-device", "--device", help="cpu, cuda, cuda:1, ...", show_default="cuda, else cpu")
    ] = None,
    no_mirroring: Annotated[
        bool, typer.Option("--disable_tta", "--no-mirroring", help="Faster, but the result is not nnU-Net's.")
    ] = False,
) -> None:
    """Show how a trained MaskSAM segments a case. Writes its queries, its uncertainty, and overlays."""
    announce_trainers()
    from masksam_nnunet.inference.explain.run import explain
    from masksam_nnunet.inference.methods import ModelName

    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints; only the page's path goes to a pipe
        page = explain(
            dataset,
            ModelName(trainer, plans, configuration),
            folds or ["0"],
            checkpoint,
            case,
            images=image or [],
            label=label,
            previous=previous,
            slices=slices or [],
            out=out,
            device=device,
            mirroring=not no_mirroring,
        )
    typer.echo(page)
