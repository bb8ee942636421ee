"""``masksam submit``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import json
import textwrap
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import fail

Challenge = StrEnum("Challenge", ["acdc", "amos", "synapse", "msd"])


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(submit)


def submit(
    challenge: Annotated[Challenge, typer.Argument(help="The challenge whose rules apply.")],
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="The folder of nnU-Net's predictions.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="The zip to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="List all defects and write nothing.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The images that were predicted; they give the list of cases and the grid of each.",
            show_default="imagesTs of -d",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="A raw dataset, by number or name.")] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The model's label names.", show_default="dataset.json in PREDICTIONS, else of -d"
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help='Your own rules, such as {"folder": "results"}.'),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="A task of msd: Task04_Hippocampus.", show_default="by the names of cases"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Package predictions for a challenge. If anything is wrong, every defect is listed.

    Names of files and labels are mapped back to the challenge's.
    """
    if (out is None) != check:
        raise typer.BadParameter("give either --out FILE or --check")
    from masksam_nnunet.inference.submission.archive import package, refusal, require_place
    from masksam_nnunet.inference.submission.inspection import inspect

    if out is not None:
        require_place(out, predictions, force=force)
    found = inspect(
        challenge.value,
        predictions,
        images=images,
        dataset=dataset,
        dataset_json=dataset_json,
        override=rules,
        task=task,
    )
    warnings = [f"note: {note}" for note in found.notes]
    for rule in found.unconfirmed:
        value = textwrap.shorten(json.dumps(rule.value, ensure_ascii=False), 160, placeholder=" ...")
        warnings.append(f"unconfirmed rule: {rule.name} = {value} ({rule.source})")
    for warning in warnings:
        typer.secho(warning, fg=typer.colors.YELLOW, err=True)
    if found.unconfirmed:
        typer.echo("compare unconfirmed rules with the challenge's page; --rules FILE.json sets others", err=True)
    if out is not None:
        package(found, out)
    elif found.defects:
        fail(refusal(found))
    if out is None:
        typer.echo(f"{found.title}: {len(found.files)} files, no defects")
    else:
        typer.echo(out)
        typer.echo(f"{found.title}: {len(found.files)} files, read back and verified", err=True)
