"""The container's command. Heavy imports inside, after the variables are set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

IN_IMAGE = Path("/opt/algorithm/model")
MOUNTED = Path("/opt/ml/model")
"""Where the platform unpacks a model that was uploaded beside the container."""


@dataclass(frozen=True)
class Settings:
    """What the command was told.

    Attributes:
        input: folder to read.
        output: folder to write.
        models: where a model is looked for; the first that is there.
        scratch: folder for temporary files, empty.
        time_limit: minutes, counted from the process's start; 0 for none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        folds: those to use; all if empty.
        checkpoint: the file in each fold's folder.
        channels: slugs of the input sockets in the order of the model's channels; from container.json if empty.
        output_slug: the output socket; from container.json if empty.
        mirroring: whether to use it where the model allows it.
    """

    input: Path
    output: Path
    models: tuple[Path, ...]
    scratch: Path
    time_limit: float = 0.0
    device: str = "auto"
    folds: tuple[str, ...] = ()
    checkpoint: str = "checkpoint_final.pth"
    channels: tuple[str, ...] = ()
    output_slug: str = ""
    mirroring: bool = True


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    input: Annotated[Path, typer.Option("--input", envvar="MASKSAM_INPUT", help="Folder to read.")] = Path("/input"),
    output: Annotated[Path, typer.Option("--output", envvar="MASKSAM_OUTPUT", help="Folder to write.")] = Path(
        "/output"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", envvar="MASKSAM_MODEL", help="Model folder.", show_default=f"{MOUNTED}, else {IN_IMAGE}"
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit",
            envvar="MASKSAM_TIME_LIMIT",
            min=0,
            help="Minutes for all; 0 for none. Where predicting would take longer, mirroring is left out, then folds.",
        ),
    ] = 0.0,
    device: Annotated[
        str, typer.Option("--device", envvar="MASKSAM_DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")
    ] = "auto",
    scratch: Annotated[
        Path, typer.Option("--scratch", envvar="MASKSAM_SCRATCH", help="Writable folder for temporary files.")
    ] = Path("/tmp"),
    folds: Annotated[
        str, typer.Option("--folds", envvar="MASKSAM_FOLDS", help="Such as 0,1,2 or all.", show_default="what is there")
    ] = "",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", envvar="MASKSAM_CHECKPOINT", help="File in each fold's folder.")
    ] = "checkpoint_final.pth",
    channels: Annotated[
        str,
        typer.Option(
            "--channels",
            envvar="MASKSAM_CHANNELS",
            help="Input sockets' slugs in the order of the model's channels, such as t2-mri,adc-mri.",
            show_default="container.json's in the model folder",
        ),
    ] = "",
    output_slug: Annotated[
        str,
        typer.Option(
            "--output-slug",
            envvar="MASKSAM_OUTPUT_SLUG",
            help="Output socket: the folder below OUTPUT/images.",
            show_default="container.json's in the model folder, else segmentation",
        ),
    ] = "",
    mirroring: Annotated[
        bool, typer.Option("--mirroring/--no-mirroring", envvar="MASKSAM_MIRRORING", help="Where the model allows it.")
    ] = True,
) -> None:
    """Predict what lies in the input folder, as a Grand Challenge algorithm or with a flat folder of images.

    Exit codes: 0 done, 1 cases failed, 2 options, 3 input, 4 model, 5 output.
    """
    from .errors import ContainerError
    from .surroundings import scratch_folder

    try:
        with scratch_folder(scratch) as folder:
            settings = Settings(
                input, output, (model,) if model else (MOUNTED, IN_IMAGE), folder, time_limit, device, _words(folds),
                checkpoint, _words(channels), output_slug, mirroring,
            )  # fmt: skip
            from .algorithm import run

            code = run(settings)
    except ContainerError as error:
        # In one line: of a failed job the platform shows the last one of stderr.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = error.exit_code
    raise typer.Exit(code)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())
