"""The container's command. Heavy imports come after the variables that libraries read are set."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.environment import EXT_TRAINER, cores, ext_trainer_value
from masksam_nnunet.errors import DataError, MaskSAMError, ModelError, UsageError

from .interface import OutputError

IN_IMAGE = Path("/opt/algorithm/model")
MOUNTED = Path("/opt/ml/model")
"""Where the platform unpacks a model that was uploaded beside the container."""

_EXIT_CODES = ((OutputError, 5), (ModelError, 4), (DataError, 3), (UsageError, 2))
_FOLDERS = ("HOME", "TMPDIR", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
"""Variables for the places below which libraries write caches, settings and temporary files."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"auto_envvar_prefix": "MASKSAM"})
def main(
    input: Annotated[Path, typer.Option(help="Folder to read.")] = Path("/input"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("/output"),
    model: Annotated[
        Path | None, typer.Option(help="Model folder.", show_default=f"{MOUNTED}, else {IN_IMAGE}")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    scratch: Annotated[Path, typer.Option(help="Writable folder for temporary files.")] = Path("/tmp"),
    checkpoint: Annotated[str, typer.Option(help="File in each fold's folder.")] = "checkpoint_final.pth",
    batch_size: Annotated[
        int | None, typer.Option(help="Windows and mirrors at once.", min=1, show_default="automatic")
    ] = None,
    channels: Annotated[
        str, typer.Option(help="Input sockets in the order of the model's channels, such as t2-mri,adc-mri.")
    ] = "",
    output_slug: Annotated[
        str, typer.Option(help="Output socket: the folder below OUTPUT/images.", show_default="segmentation")
    ] = "",
    folds: Annotated[str, typer.Option(help="Such as 0,1,2 or all.", show_default="all that exist")] = "",
    mirroring: Annotated[
        bool | None, typer.Option(help="Mirror windows where the model allows it: up to eight times the time.")
    ] = None,
    step_size: Annotated[
        float | None, typer.Option(help="Step between windows, as a share of the patch.", show_default="0.5")
    ] = None,
) -> None:
    """Predict what lies in the input folder, as a Grand Challenge algorithm or with a flat folder of images.

    channels, output, folds, mirroring and step_size can also be set in a container.json in the model folder.

    Exit codes: 0 done, 1 cases failed, 2 options, 3 input, 4 model, 5 output.
    """
    options = {
        "channels": channels.replace(",", " ").split() or None,
        "output": output_slug or None,
        "folds": folds.replace(",", " ").split() or None,
        "mirroring": mirroring,
        "step_size": step_size,
    }
    models = (model,) if model else (MOUNTED, IN_IMAGE)
    try:
        with scratch_folder(scratch) as folder:
            from .algorithm import run

            code = run(input, output, models, folder, options, device, checkpoint, batch_size)
    except MaskSAMError as error:
        # In one line: of a failed job the platform shows the last one of stderr.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
    raise typer.Exit(code)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder below ``parent``, the only one written beside the output, and libraries pointed to it."""
    try:
        made = tempfile.TemporaryDirectory(prefix="masksam-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"--scratch {parent} is not writable ({error.strerror}): mount one, --tmpfs /tmp") from error
    with made as name:
        for variable in _FOLDERS:
            (Path(name) / variable).mkdir()
            os.environ[variable] = str(Path(name) / variable)
        os.environ.setdefault("USER", "algorithm")  # a user without a name in the container cannot be looked up
        os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
        # The machine may have more processors than the container may use.
        os.environ.setdefault("nnUNet_def_n_proc", str(min(8, cores())))
        os.environ["nnUNet_compile"] = "f"  # needs a compiler, and minutes
        sys.dont_write_bytecode = True
        yield Path(name)


if __name__ == "__main__":
    app(prog_name="python -m masksam_nnunet.inference.docker")
