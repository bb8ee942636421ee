"""The ``masksam`` command. Imports inside the commands: ``masksam --help`` must not wait for torch."""

from __future__ import annotations

import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet import __version__
from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.sam_files import CHECKPOINTS

from . import benchmark, data, doctor, explain, export, predict, submit, train
from .common import Commands, Dataset, SeveralValues

app = typer.Typer(
    name="masksam",
    cls=Commands,
    help="MaskSAM for nnU-Net: Segment Anything with mask classification, as an nnU-Net v2 trainer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long option names off
    pretty_exceptions_enable=False,  # it would print every local tensor of a failed training
    context_settings={"help_option_names": ["-h", "--help"]},
)

_NAMES = (*CHECKPOINTS, *(name for name, backbone in BACKBONES.items() if backbone.checkpoint))
CheckpointName = StrEnum("CheckpointName", {name: name for name in _NAMES})  # type: ignore[misc]
GeneratorName = StrEnum("GeneratorName", ["light", "unet", "resenc"])
BackboneName = StrEnum("BackboneName", {name: name for name in ("auto", *BACKBONES)})  # type: ignore[misc]
AUTO = BackboneName("auto")
LIGHT = GeneratorName("light")
PresetName = StrEnum("PresetName", ["acdc", "synapse", "amos"])
Shell = StrEnum("Shell", ["sh", "fish", "powershell"])


def main() -> None:
    """Entry point of the console script."""
    app()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"masksam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def env(
    shell: Annotated[Shell, typer.Option(help="The shell whose syntax to print.")] = Shell.sh,
) -> None:
    """Print the shell line that sets nnUNet_extTrainer. Use it as eval "$(masksam env)"."""
    value = ext_trainer_value(os.environ.get(EXT_TRAINER))
    match shell:
        case Shell.sh:
            line = f"export {EXT_TRAINER}={shlex.quote(value)}"
        case Shell.fish:
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            line = f"set -gx {EXT_TRAINER} '{escaped}'"
        case Shell.powershell:
            doubled = value.replace("'", "''")
            line = f"$env:{EXT_TRAINER} = '{doubled}'"
    typer.echo(line)


@app.command()
def weights(
    name: Annotated[
        CheckpointName | None, typer.Argument(help="The checkpoint to fetch, by its name or a backbone's.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A file that you have, to be verified and copied.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A mirror: the file's address or, ending in /, its folder's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is in the cache.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Show what there is, and where it is on this machine.")
    ] = False,
) -> None:
    """Fetch a SAM checkpoint, verify it, and print where it is. A broken download is resumed."""
    if listed:
        return _list_weights()
    if name is None or (source is not None and url is not None):
        raise typer.BadParameter("give the name of a checkpoint, or --list; and either --from or --url, not both")
    from masksam_nnunet.sam_weights import fetch

    typer.echo(fetch(name.value, url=url, source=source, force=force, try_out=_try_out))


def _try_out(path: Path, backbone: str) -> None:
    """Check a file of no published hash by what is in it."""
    from masksam_nnunet.modeling.network import check_sam_file

    check_sam_file(path, backbone)


def _list_weights() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from masksam_nnunet.sam_weights import located

    table = Table("name", "size", "licence", "known training data", box=box.SIMPLE)
    for x in CHECKPOINTS.values():
        table.add_row(x.name, f"{x.size / 1e6:,.0f} MB", x.licence, x.data)
    Console().print(table)
    here = {x.name: path for x in CHECKPOINTS.values() if (path := located(x))}
    typer.echo("\n".join(["On this machine:", *(f"  {name}: {path}" for name, path in here.items())] if here else []))


@app.command(cls=SeveralValues)
def plan(
    dataset: Dataset,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--configuration",
            help="One or more to plan; by default all that nnU-Net has.",
        ),
    ] = None,
    backbone: Annotated[BackboneName, typer.Option(help="auto: the largest SAM that fits memory and time.")] = AUTO,
    gpu: Annotated[
        str | None,
        typer.Option(help="What to train on: cpu, rtx3090, rtx4090, a100, h100, ...; by default the GPU at hand."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of the card to train on; by default all it has.")
    ] = None,
    hours: Annotated[float, typer.Option(help="How long the training of a fold may take.")] = 24.0,
    preset: Annotated[PresetName | None, typer.Option(help="One of the paper's settings.")] = None,
    generator: Annotated[
        GeneratorName,
        typer.Option(
            help="What makes SAM's prompts: light, a decoder over SAM's features; unet or resenc, one of nnU-Net's own "
            "U-Nets with them."
        ),
    ] = LIGHT,
    plans_name: Annotated[str, typer.Option(help="Name of the plans file.")] = "MaskSAMPlans",
) -> None:
    """Plan MaskSAM for a dataset, a GPU and hours. This chooses backbone, patch, batch and resolution."""
    from masksam_nnunet.plans.planning import plan_dataset

    published = preset and preset.value
    plan_dataset(
        dataset, configurations or (), backbone.value, gpu_memory, published, plans_name, hours, gpu, generator.value
    )


for group in (doctor, train, predict, benchmark, data, explain, export, submit):
    group.register(app)

if __name__ == "__main__":
    main()
