"""``masksam check``. Heavy imports inside the command, as in ``cli``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .common import fail


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(check)


def check(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
) -> None:
    """Read a raw dataset to its last voxel and list all that is wrong with it; exit code 1 if anything is."""
    from masksam_nnunet.errors import MaskSAMError
    from masksam_nnunet.plans.planning import find_dataset
    from masksam_nnunet.plans.raw_check import check_raw_dataset

    try:
        name = find_dataset(dataset, ("nnUNet_raw",))
        preprocessed = os.environ.get("nnUNet_preprocessed")  # its splits are what training uses
        result = check_raw_dataset(
            Path(os.environ["nnUNet_raw"]) / name, Path(preprocessed) / name if preprocessed else None
        )
    except MaskSAMError as error:
        fail(str(error))
    for note in result.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
    for defect in result.defects:
        typer.secho(f"defect: {defect}", fg=typer.colors.RED, err=True)
    if result.defects:
        count = "1 defect" if len(result.defects) == 1 else f"{len(result.defects)} defects"
        fail(f"{result.dataset.folder} has {count}; mend them and check again")
    typer.echo(f"{result.dataset.name}: {len(result.dataset.images)} cases, all sound")
