"""The ``masksam`` command. Imports inside the commands: ``masksam --help`` must not wait for torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from masksam_nnunet import __version__
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import MaskSAMError
from masksam_nnunet.stop_signals import REQUEUE, passed_on

from . import benchmark as cli_benchmark
from . import check as cli_check
from . import data as cli_datasets
from . import explain as cli_explain
from . import export as cli_export
from . import submit as cli_submit
from .fail import ext_trainer_or_fail, fail
from .options import SeveralValues
from .predict import masksam_predictor, take_options

DEFAULT_TRAINER = "MaskSAMTrainer"

app = typer.Typer(
    name="masksam",
    help="MaskSAM for nnU-Net: Segment Anything with mask classification, as an nnU-Net v2 trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it would print every local tensor of a failed training
    context_settings={"help_option_names": ["-h", "--help"]},
)

# nnU-Net parses these commands' arguments, its -h included.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class Backbone(StrEnum):
    """The released SAM checkpoints."""

    vit_b = "vit_b"
    vit_l = "vit_l"
    vit_h = "vit_h"


class AnyBackbone(StrEnum):
    """What can be planned."""

    auto = "auto"
    tiny = "tiny"
    vit_b = "vit_b"
    vit_l = "vit_l"
    vit_h = "vit_h"


class PresetName(StrEnum):
    """The paper's settings."""

    acdc = "acdc"
    synapse = "synapse"
    amos = "amos"


class Shell(StrEnum):
    """Shells whose syntax for setting a variable is known."""

    sh = "sh"
    fish = "fish"
    powershell = "powershell"


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
    shell: Annotated[Shell, typer.Option(help="Whose syntax to print.")] = Shell.sh,
) -> None:
    """Print the line that shows MaskSAM's trainers to nnU-Net: eval "$(masksam env)"."""
    typer.echo(_assignment(shell, ext_trainer_or_fail()))


def _assignment(shell: Shell, value: str) -> str:
    """The line that exports ``value`` to the programs that ``shell`` starts."""
    match shell:
        case Shell.sh:
            return f"export {EXT_TRAINER}={shlex.quote(value)}"
        case Shell.fish:
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            return f"set -gx {EXT_TRAINER} '{escaped}'"
        case Shell.powershell:
            doubled = value.replace("'", "''")
            return f"$env:{EXT_TRAINER} = '{doubled}'"


@app.command()
def weights(
    backbone: Annotated[Backbone, typer.Argument(help="The SAM checkpoint to fetch.", show_default=False)],
    source: Annotated[
        Path | None, typer.Option("--from", help="A file that you have, to be verified and copied.", show_default=False)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A mirror: the file's address or, ending in /, its folder's.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch anew what is already there.")] = False,
) -> None:
    """Fetch a SAM checkpoint, verify it, and print where it is. A broken download is resumed."""
    if source is not None and url is not None:
        raise typer.BadParameter("give either --from or --url, not both")
    from masksam_nnunet.sam_weights import fetch

    try:
        path = fetch(backbone.value, url=url, source=source, force=force)
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(path)


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def train(context: typer.Context) -> None:
    """nnUNetv2_train with MaskSAM's trainers; all arguments are nnU-Net's, -tr defaults to MaskSAMTrainer."""
    required = ("nnUNet_preprocessed", "nnUNet_results")
    with passed_on():
        try:
            _run_nnunet(
                "train", "nnunetv2.run.run_training", "run_training_entry", context.args, required, _checked_training
            )
        except Exception as error:
            if getattr(error, "exit_code", None) == REQUEUE:  # of a rank, in PyTorch's ProcessExitedException
                raise typer.Exit(REQUEUE) from error
            raise


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def predict(context: typer.Context) -> None:
    """nnUNetv2_predict in batches, or by an ensemble of models; its arguments and a few more (-h), -tr as in train."""
    module = "nnunetv2.inference.predict_from_raw_data"
    arguments, options = take_options(context.args)
    within = partial(masksam_predictor, options=options, show_help=_asks_help(arguments))
    required = () if options.model else ("nnUNet_results",)
    _run_nnunet("predict", module, "predict_entry_point", arguments, required, within)


@app.command(cls=SeveralValues)
def plan(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--configuration",
            help="To plan, one or more; all that nnU-Net has if none.",
            show_default=False,
        ),
    ] = None,
    backbone: Annotated[AnyBackbone, typer.Option(help="auto: the largest SAM that fits.")] = AnyBackbone.auto,
    gpu_memory: Annotated[float, typer.Option(metavar="GB", help="Memory of the card to train on.")] = 24.0,
    preset: Annotated[PresetName | None, typer.Option(help="One of the paper's settings.", show_default=False)] = None,
    plans_name: Annotated[str, typer.Option(help="Name of the plans file.")] = "MaskSAMPlans",
) -> None:
    """Plan MaskSAM for a dataset with a fingerprint: patch, batch, u, queries, backbone, under a memory target."""
    from masksam_nnunet.errors import MaskSAMError
    from masksam_nnunet.plans.planning import plan_dataset

    try:
        plan_dataset(dataset, configurations or (), backbone.value, gpu_memory, preset and preset.value, plans_name)
    except MaskSAMError as error:
        fail(str(error))


def _asks_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def _run_nnunet(
    command: str,
    module: str,
    entry: str,
    arguments: list[str],
    required: tuple[str, ...],
    within: Callable[[ModuleType], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run one of nnU-Net's own commands in this process, as if it had been called with ``arguments``.

    ``within`` makes a context, of the command's module, to run it in.
    """
    asks_help = _asks_help(arguments)
    missing = [name for name in required if not os.environ.get(name)]
    if missing and not asks_help:
        fail(
            f"{' and '.join(missing)} not set: nnU-Net keeps its data in the folders that the environment variables "
            "nnUNet_raw, nnUNet_preprocessed and nnUNet_results name; export them first"
        )
    # In the environment, not only here: the worker processes that nnU-Net spawns look trainers up too.
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    if command == "train" and not asks_help:
        _require_device(arguments)
    sys.argv = [f"masksam {command}", *(arguments if asks_help else _with_trainer(arguments))]

    nnunet = import_module(module)
    try:
        with within(nnunet):
            getattr(nnunet, entry)()
    except MaskSAMError as error:
        fail(str(error))


@contextmanager
def _checked_training(nnunet: ModuleType) -> Iterator[None]:
    """While it lasts, nnU-Net's command in the module ``nnunet`` trains only where all that it reads is there."""
    train = nnunet.run_training

    def checked(*arguments: Any, **options: Any) -> None:
        from masksam_nnunet.benchmarks.train_command import require_trainable

        require_trainable(*arguments, **options)
        train(*arguments, **options)

    vars(nnunet)["run_training"] = checked
    try:
        yield
    finally:
        vars(nnunet)["run_training"] = train


def _require_device(arguments: list[str]) -> None:
    """nnU-Net would leave a results folder and a traceback behind."""
    named = dict(pairwise(arguments)).get("-device")
    if named not in (None, "cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        fail(
            f"{'-device cuda' if named else 'no -device given, so cuda'}: PyTorch {torch.__version__} sees no GPU "
            "here; train on a machine that has one, install a PyTorch for its driver, or add -device cpu"
        )


def _with_trainer(arguments: list[str]) -> list[str]:
    """``arguments`` with ``-tr MaskSAMTrainer`` unless they name a trainer (argparse also takes -t and -tr=NAME)."""
    if any(argument.split("=")[0] in ("-t", "-tr") for argument in arguments):
        return arguments
    typer.echo(f"no -tr given: using -tr {DEFAULT_TRAINER}", err=True)
    return [*arguments, "-tr", DEFAULT_TRAINER]


cli_benchmark.register(app)
cli_check.register(app)
cli_datasets.register(app)
cli_explain.register(app)
cli_export.register(app)
cli_submit.register(app)

if __name__ == "__main__":
    main()
