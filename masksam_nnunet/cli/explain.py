"""``masksam explain``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import MaskSAMError

from .common import SeveralValues, ext_trainer_or_fail, fail


class _CaseAnywhere(SeveralValues):
    """What cannot be a further value of an option is the case: ``-f 0 CASE``."""

    def takes(self, option: str, word: str) -> bool:
        if option in ("-f", "--folds", "--slices"):
            return word.isdecimal() or word in ("all", "auto")
        return "." in word  # --image: files have endings


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=_CaseAnywhere)(explain)


def explain(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="nnU-Net's.", show_default=False)],
    case: Annotated[
        str | None,
        typer.Argument(
            help="A case of the raw dataset, imagesTr or imagesTs; with --image any name.", show_default=False
        ),
    ] = None,
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="The trainer's class.")] = "MaskSAMTrainer",
    plans: Annotated[str, typer.Option("-p", "--plans", help="Name of the plans.")] = "nnUNetPlans",
    folds: Annotated[
        list[str] | None,
        typer.Option(
            "-f",
            "--folds",
            help="One or more, or all; with several their disagreement is shown too. Queries are the first one's.",
            show_default="0",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("-chk", "--checkpoint", help="File name of the checkpoints.")
    ] = "checkpoint_final.pth",
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Files, one per channel, of what is no case of the dataset.", show_default=False),
    ] = None,
    label: Annotated[
        Path | None,
        typer.Option("--label", help="The label map to show; the dataset's own if not given.", show_default=False),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            "-prev_stage_predictions",
            "--prev-stage-predictions",
            help="For a cascade: folder with the first stage's predictions.",
            show_default=False,
        ),
    ] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slices", help="Numbers from 0 in the image, or auto.", show_default="auto"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write.", show_default="explain_CASE")
    ] = None,
    device: Annotated[
        str | None, typer.Option("-device", "--device", help="cpu, cuda, cuda:1, ...", show_default="cuda, else cpu")
    ] = None,
    no_mirroring: Annotated[
        bool, typer.Option("--disable_tta", "--no-mirroring", help="Faster; the result is then no longer nnU-Net's.")
    ] = False,
) -> None:
    """Show what a trained MaskSAM makes of a case: boxes, masks, classes of its queries, uncertainty, overlays."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    from masksam_nnunet.inference.explain.run import Request, explain

    request = Request(
        dataset=dataset,
        configuration=configuration,
        trainer=trainer,
        plans=plans,
        folds=folds or ["0"],
        checkpoint=checkpoint,
        case=case,
        images=image or [],
        label=label,
        previous=previous,
        slices=slices or [],
        out=out,
        device=device,
        mirroring=not no_mirroring,
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net talks; the path alone is for pipes
            page = explain(request)
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(page)
