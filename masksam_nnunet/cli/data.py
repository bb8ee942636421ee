"""The commands for raw datasets: ``masksam convert``, ``data``, ``split`` and ``check``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Dataset, NewDataset, fail

Modality = StrEnum("Modality", ["ct", "all"])
Organs = StrEnum("Organs", {"thirteen": "13", "eight": "8"})
SynapseSplit = StrEnum("SynapseSplit", {"transunet": "18/12", "none": "none"})

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of the unpacked download.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a download with fewer cases than the official one.")]

convert_app = typer.Typer(help="Convert a challenge's download to a raw dataset.", no_args_is_help=True)
data_app = typer.Typer(help="Download a dataset for a first run.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(convert_app, name="convert")
    app.add_typer(data_app, name="data")
    app.command()(split)
    app.command()(check)


@convert_app.command()
def acdc(source: Source, dataset_id: NewDataset, partial: Partial = False) -> None:
    """Convert ACDC; SOURCE holds training and testing. The split is by patient."""
    _convert("acdc", source, dataset_id, partial=partial)


@convert_app.command()
def synapse(
    source: Source,
    dataset_id: NewDataset,
    organs: Annotated[Organs, typer.Option(help="8 are TransUNet's; others become background.")] = Organs.thirteen,
    split: Annotated[
        SynapseSplit,
        typer.Option(help="18/12 puts TransUNet's test cases into imagesTs, none puts all into imagesTr."),
    ] = SynapseSplit.transunet,
    partial: Partial = False,
) -> None:
    """Convert Synapse (BTCV abdomen); SOURCE is RawData or the folder above it."""
    _convert("synapse", source, dataset_id, organs=int(organs), split=split.value, partial=partial)


@convert_app.command()
def amos(
    source: Source,
    dataset_id: NewDataset,
    modality: Annotated[Modality, typer.Option(help="ct, or all for CT and MR.")] = Modality.ct,
) -> None:
    """Convert AMOS22 (the release after the challenge); SOURCE holds dataset.json."""
    _convert("amos", source, dataset_id, modality=modality.value)


@convert_app.command()
def msd(
    source: Source,
    dataset_id: NewDataset,
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 2,
) -> None:
    """Convert a task of the Medical Segmentation Decathlon; SOURCE is its folder TaskXX_Name."""
    _convert("msd", source, dataset_id, processes=processes)


def _convert(kind: str, source: Path, dataset_id: int, **options: Any) -> None:
    from masksam_nnunet.plans.datasets import convert

    folder = convert(kind, source, dataset_id, **options)
    _done(folder, dataset_id)


@data_app.command()
def hippocampus(
    dataset_id: NewDataset = 4,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the dataset instead of nnUNet_raw.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Use this Task04_Hippocampus.tar instead of downloading it."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Address of a mirror of the file or, ending in /, its folder."),
    ] = None,
) -> None:
    """Download, verify and convert MSD Task04 Hippocampus (28 MB). A broken download is resumed."""
    if source is not None and url is not None:
        raise typer.BadParameter("give either --from or --url, not both")
    from masksam_nnunet.plans.datasets.msd import get_hippocampus

    folder = get_hippocampus(dataset_id=dataset_id, out=out, url=url, source=source)
    _done(folder, dataset_id)
    typer.echo(f"for a first look: masksam demo --data {folder}", err=True)


def _done(folder: Path, dataset_id: int) -> None:
    """The new dataset on stdout, what to do with it on stderr."""
    typer.echo(folder)
    typer.echo(
        f"next: nnUNetv2_plan_and_preprocess -d {dataset_id} -c 3d_fullres --verify_dataset_integrity\n"
        f"then: masksam plan -d {dataset_id} -c 3d_fullres",
        err=True,
    )


def split(
    dataset: Dataset,
    group: Annotated[
        str,
        typer.Option(
            metavar="REGEX",
            help="Finds the patient in a case's name: its group named patient, else all groups, else the match.",
        ),
    ],
    folds: Annotated[int, typer.Option(min=2, help="Number of folds.")] = 5,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random draw; the default is nnU-Net's.")
    ] = 12345,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing split.")] = False,
) -> None:
    """Write folds that keep each patient's cases together. For example --group '(patient[0-9]+)_'."""
    from masksam_nnunet.plans.splits import split_dataset

    report = split_dataset(dataset, group, folds=folds, seed=seed, force=force)
    typer.echo(f"{report.path} {'written' if report.written else 'has this split already'}")
    typer.echo("fold  train patients (cases)  val patients (cases)")
    for number, fold in enumerate(report.folds):
        train, val = (
            f"{len({report.patients[case] for case in fold[part]})} ({len(fold[part])})" for part in ("train", "val")
        )
        typer.echo(f"{number:<4}  {train:<22}  {val}")
    for note in report.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)


def check(
    dataset: Dataset,
) -> None:
    """List all defects of a raw dataset. Every file is read; the exit code is 1 if there are any."""
    from masksam_nnunet.plans.raw_check import check_raw_dataset
    from masksam_nnunet.plans.raw_data import find_dataset

    name = find_dataset(dataset, ("nnUNet_raw",))
    preprocessed = os.environ.get("nnUNet_preprocessed")  # training uses its splits
    result = check_raw_dataset(
        Path(os.environ["nnUNet_raw"]) / name, Path(preprocessed) / name if preprocessed else None
    )
    for note in result.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
    for defect in result.defects:
        typer.secho(f"defect: {defect}", fg=typer.colors.RED, err=True)
    if result.defects:
        count = "1 defect" if len(result.defects) == 1 else f"{len(result.defects)} defects"
        fail(f"{result.dataset.folder} has {count}; correct them and check again")
    typer.echo(f"{result.dataset.name}: {len(result.dataset.images)} cases, no defects")
