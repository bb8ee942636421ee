"""``masksam benchmark``, ``masksam report`` and ``masksam demo``. Heavy imports are inside the commands."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from masksam_nnunet.errors import UsageError

from .common import Dataset, SeveralValues, announce_trainers

Executor = StrEnum("Executor", ["local", "slurm"])
AcceptUnfair = Annotated[
    bool, typer.Option("--accept-unfair", help="Report an unfair comparison too; the report opens with the reasons.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(cls=SeveralValues)(benchmark)
    app.command()(report)
    app.command()(demo)


def benchmark(
    dataset: Dataset,
    trainers: Annotated[
        list[str],
        typer.Option(
            "--trainers",
            help="Two or more: TRAINER, TRAINER@PLANS, or nnunet, resenc-m|l|xl, primus-s|b|m|l.",
        ),
    ],
    plans: Annotated[
        list[str] | None,
        typer.Option("-p", "--plans", help="One for all trainers, or one for each.", show_default="nnUNetPlans"),
    ] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="One of the plans'.")] = "3d_fullres",
    folds: Annotated[
        list[int] | None, typer.Option("-f", "--folds", help="One or more.", show_default="0 1 2 3 4")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="For each fold, with trainers whose names end in _budget."),
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="The same, in place of minutes.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The benchmark's folder.",
            show_default="benchmark_CONFIGURATION, or few_labels_CONFIGURATION, in the results",
        ),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "-device",
            "--device",
            "--devices",
            help="cpu, cuda, or GPUs by number: a fold at a time on each.",
            show_default="cuda",
        ),
    ] = None,
    ensembles: Annotated[bool, typer.Option(help="Ensemble all pairs; validation then saves probabilities.")] = True,
    postprocessing: Annotated[bool, typer.Option(help="Choose nnU-Net's post-processing; ensembles need it.")] = True,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Finds the patient in a case's name, as in masksam split.",
            show_default="names such as patient007_ED",
        ),
    ] = None,
    train_cases: Annotated[
        list[str] | None,
        typer.Option(
            "--train-cases",
            metavar="N|all",
            help="Train on N patients of each fold, with all their cases. Several N: Dice is drawn against them.",
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seeds", min=0, max=2**32 - 1, help="Draws of the N patients, one or more.", show_default="0"),
    ] = None,
    accept_unfair: AcceptUnfair = False,
    processes: Annotated[int, typer.Option("-np", "--processes", min=1, help="Workers that score and ensemble.")] = 2,
    executor: Annotated[Executor, typer.Option(help="This machine, or a cluster.")] = Executor.local,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    hours: Annotated[float, typer.Option(min=0.05, help="SLURM: time limit; a job that reaches it continues.")] = 24.0,
    gpus: Annotated[int | None, typer.Option(min=0, help="SLURM: for each job.", show_default="1, on cpu 0")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="SLURM: for each job.")] = 8,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="SLURM: for each job.")] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY[=VALUE]", help="More for sbatch: account=lab."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="SLURM: stay until all jobs have ended.")] = False,
) -> None:
    """Compare methods on identical folds. Missing folds are trained first, with nnU-Net's own commands."""
    announce_trainers()
    from masksam_nnunet.benchmarks import few_labels, run
    from masksam_nnunet.benchmarks.definition import FOLDERS, Benchmark
    from masksam_nnunet.benchmarks.slurm import SlurmSettings, parse_slurm_options
    from masksam_nnunet.gpu import device_kind
    from masksam_nnunet.inference.methods import parse_methods
    from masksam_nnunet.plans.raw_data import find_dataset

    if executor is Executor.local and (slurm or partition or wait):
        raise UsageError("--slurm, --partition and --wait are for a cluster: add --executor slurm")
    if seeds and not train_cases:
        raise UsageError("--seeds draws the patients of --train-cases: add it, for example --train-cases 2 4 8 all")
    if train_cases and executor is Executor.slurm:
        raise UsageError("--train-cases trains on this machine only: leave out --executor slurm")
    chosen = devices or ["cuda"]
    defined = Benchmark(
        dataset=find_dataset(dataset, FOLDERS),
        configuration=configuration,
        methods=parse_methods(trainers, plans or (), configuration),
        folds=tuple(folds or range(5)),
        minutes=minutes,
        iterations=iterations,
        device=device_kind(chosen),
        ensembles=ensembles and postprocessing and len(trainers) > 1,
        postprocessing=postprocessing,
        accept_unfair=accept_unfair,
        processes=processes,
        group=group,
    )
    page: Path | None
    if train_cases:
        page = few_labels.run_few_labels(defined, out, chosen, train_cases, seeds or [0])
    elif executor is Executor.local:
        page = run.run_benchmark(defined, out, chosen)
    else:
        wanted = gpus if gpus is not None else int(defined.device == "cuda")
        settings = SlurmSettings(partition, round(60 * hours), wanted, cpus, memory, parse_slurm_options(slurm or ()))
        page = run.submit_benchmark(defined, out, settings, wait)
    if page is not None:
        typer.echo(page)


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The benchmark's folder.")],
    accept_unfair: AcceptUnfair = False,
) -> None:
    """Evaluate a benchmark again and write its report."""
    announce_trainers()
    from masksam_nnunet.benchmarks import few_labels, run

    with few_labels.own_folders(folder):
        typer.echo(run.report(folder, accept_unfair=accept_unfair or None))


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="An nnU-Net raw dataset (DatasetXXX_Name).", show_default="generated phantoms"),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for nnU-Net's data and the report.")] = Path(
        "masksam_demo"
    ),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="For all of it; exceeded where so few iterations would show nothing.")
    ] = 12.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of both methods.")] = 2,
    fold: Annotated[int, typer.Option(min=0, max=4, help="Fold of the cross-validation.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the phantoms; nnU-Net training is unseeded.")] = 0,
) -> None:
    """Compare MaskSAM with nnU-Net: both train for the same number of iterations on one fold, and a report is written.

    MaskSAM has LiteMedSAM's weights; where they are not installed, a tiny encoder that is not SAM.
    """
    announce_trainers()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):  # nnU-Net reads them when it is imported
        os.environ[name] = str(out.absolute() / name)
    from masksam_nnunet.benchmarks.demo import run_demo

    typer.echo(run_demo(out, data, minutes, batch_size, fold, seed))
