"""``masksam benchmark`` and ``masksam report``. Heavy imports inside the commands, as in ``cli``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.environment import EXT_TRAINER

from .common import SeveralValues, ext_trainer_or_fail, fail


class Executor(StrEnum):
    """Where folds are trained."""

    local = "local"
    slurm = "slurm"


AcceptUnfair = Annotated[
    bool, typer.Option("--accept-unfair", help="Write the report in spite of what is not fair; it then opens with it.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(cls=SeveralValues)(benchmark)
    app.command()(report)


def benchmark(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.", show_default=False)],
    trainers: Annotated[
        list[str],
        typer.Option(
            "--trainers",
            help="Two or more: TRAINER, TRAINER@PLANS, or nnunet, resenc-m|l|xl, primus-s|b|m|l.",
            show_default=False,
        ),
    ],
    plans: Annotated[
        list[str] | None,
        typer.Option("-p", "--plans", help="One for all trainers, or one for each.", show_default="nnUNetPlans"),
    ] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="nnU-Net's.")] = "3d_fullres",
    folds: Annotated[
        list[int] | None, typer.Option("-f", "--folds", help="One or more.", show_default="0 1 2 3 4")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Of each fold, for trainers whose names end in _budget.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The benchmark's folder.", show_default="benchmark_CONFIGURATION in the results"),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--devices", help="cpu, cuda, or GPUs by number: a fold at a time on each.", show_default="cuda"),
    ] = None,
    ensembles: Annotated[bool, typer.Option(help="Ensemble all pairs; validation then saves probabilities.")] = True,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Finds the patient in a case's name, as in masksam split.",
            show_default="names such as patient007_ED tell",
        ),
    ] = None,
    accept_unfair: AcceptUnfair = False,
    processes: Annotated[int, typer.Option("-np", "--processes", min=1, help="Workers that score and ensemble.")] = 2,
    executor: Annotated[Executor, typer.Option(help="This machine, or a cluster.")] = Executor.local,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.", show_default=False)] = None,
    hours: Annotated[float, typer.Option(min=0.05, help="SLURM: time limit; a job that reaches it goes on.")] = 24.0,
    gpus: Annotated[int | None, typer.Option(min=0, help="SLURM: for each job.", show_default="1, on cpu 0")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="SLURM: for each job.")] = 8,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="SLURM: for each job.", show_default=False)] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY[=VALUE]", help="More for sbatch: account=lab.", show_default=False),
    ] = None,
    wait: Annotated[bool, typer.Option(help="SLURM: stay until all jobs have ended.")] = False,
) -> None:
    """Train what lacks of methods and folds by nnU-Net's own commands, then compare them on identical folds."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    from masksam_nnunet.benchmarks import run
    from masksam_nnunet.benchmarks.slurm_jobs import SlurmSettings, parse_slurm_options
    from masksam_nnunet.errors import MaskSAMError

    chosen = devices or ["cuda"]
    try:
        definition = run.define(
            dataset,
            configuration,
            trainers,
            plans or (),
            folds or range(5),
            minutes,
            chosen,
            ensembles,
            accept_unfair,
            processes,
            group,
        )
        settings = None
        if executor is Executor.slurm:
            wanted = gpus if gpus is not None else int(definition.grid.device == "cuda")
            settings = SlurmSettings(
                partition, round(60 * hours), wanted, cpus, memory, parse_slurm_options(slurm or ())
            )
        elif slurm or partition or wait:
            raise MaskSAMError("--slurm, --partition and --wait are for a cluster: add --executor slurm")
        page = run.run_benchmark(definition, out or run.default_folder(definition), chosen, settings, wait)
    except MaskSAMError as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("interrupted: what is done is kept; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if page is not None:
        typer.echo(page)


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The benchmark's.", show_default=False)],
    accept_unfair: AcceptUnfair = False,
) -> None:
    """Evaluate a benchmark anew, from its trained folds, and write its report."""
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    from masksam_nnunet.benchmarks import run
    from masksam_nnunet.errors import MaskSAMError

    try:
        page = run.report(folder, accept_unfair=accept_unfair or None)
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(page)
