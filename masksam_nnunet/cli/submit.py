"""``masksam submit``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import fail


class Challenge(StrEnum):
    """Challenges whose rules are known."""

    acdc = "acdc"
    amos = "amos"
    synapse = "synapse"
    msd = "msd"


_SHOWN = 160  # characters of a rule's value


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(submit)


def submit(
    challenge: Annotated[Challenge, typer.Argument(help="Whose rules apply.", show_default=False)],
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="The folder that was predicted into.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The zip to write.", show_default=False)] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what is wrong and write nothing.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The images that were predicted, by nnU-Net's names or the challenge's: for places, sizes and the "
            "list of cases. Default: imagesTs of -d.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("-d", "--dataset", help="Raw dataset of nnU-Net, number or name.", show_default=False)
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of the labels. Default: dataset.json in PREDICTIONS, else that of -d.",
            show_default=False,
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help='Rules of your own, such as {"folder": "results"}.', show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Of msd, such as Task04_Hippocampus; else by the names.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Package predictions as a challenge accepts them, or list every defect; names and labels are mapped back."""
    if (out is None) != check:
        raise typer.BadParameter("give either --out FILE or --check")
    from masksam_nnunet.errors import MaskSAMError
    from masksam_nnunet.inference.submission.inspection import Request, inspect
    from masksam_nnunet.inference.submission.package import package, refusal, require_place

    request = Request(challenge.value, predictions, images, dataset, dataset_json, rules, task)
    try:
        if out is not None:
            require_place(out, request, force=force)
        found = inspect(request)
        for note in found.notes:
            typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
        for rule in found.unconfirmed:
            text = f"unconfirmed rule: {rule.name} = {_short(rule.value)} ({rule.source})"
            typer.secho(text, fg=typer.colors.YELLOW, err=True)
        if found.unconfirmed:
            typer.echo("compare unconfirmed rules with the challenge's page; --rules FILE.json sets others", err=True)
        if out is None:
            if found.defects:
                fail(refusal(found))
            typer.echo(f"{found.title}: {len(found.entries)} files, no defects")
            return
        package(found, out)
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(out)
    typer.echo(f"{found.title}: {len(found.entries)} files, read back and verified", err=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
