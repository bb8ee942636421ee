"""``masksam convert``, ``masksam split`` and ``masksam data``. Heavy imports inside the commands, as in ``cli``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from masksam_nnunet.errors import MaskSAMError

from .common import fail


class Modality(StrEnum):
    """Parts of AMOS."""

    ct = "ct"
    all = "all"


class Organs(StrEnum):
    """Label sets of Synapse."""

    thirteen = "13"
    eight = "8"


class SynapseSplit(StrEnum):
    """Which of the labelled Synapse cases are test cases."""

    transunet = "18/12"
    none = "none"


Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="The unpacked official download.", show_default=False)]
DatasetId = Annotated[
    int, typer.Option("-d", "--dataset", min=1, max=999, help="The new dataset's number.", show_default=False)
]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a download with fewer cases than the official one.")]

convert_app = typer.Typer(
    help="Convert a challenge's official download to nnU-Net's raw format, in nnUNet_raw.", no_args_is_help=True
)
data_app = typer.Typer(help="Fetch a dataset for a first run.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(convert_app, name="convert")
    app.add_typer(data_app, name="data")
    app.command()(split)


@convert_app.command()
def acdc(source: Source, dataset_id: DatasetId, partial: Partial = False) -> None:
    """ACDC: the folder that holds training and testing; split by patient."""
    _convert("acdc", source, dataset_id, partial=partial)


@convert_app.command()
def synapse(
    source: Source,
    dataset_id: DatasetId,
    organs: Annotated[Organs, typer.Option(help="13: BTCV's. 8: TransUNet's, others background.")] = Organs.thirteen,
    split: Annotated[
        SynapseSplit, typer.Option(help="18/12: TransUNet's test cases to imagesTs. none: all to imagesTr.")
    ] = SynapseSplit.transunet,
    partial: Partial = False,
) -> None:
    """Synapse (BTCV abdomen): the folder RawData, or the one above it."""
    _convert("synapse", source, dataset_id, organs=int(organs), split=split.value, partial=partial)


@convert_app.command()
def amos(
    source: Source,
    dataset_id: DatasetId,
    modality: Annotated[Modality, typer.Option(help="ct: cases up to 500 only. all: CT and MR.")] = Modality.ct,
) -> None:
    """AMOS22, the release after the challenge: the folder that holds dataset.json."""
    _convert("amos", source, dataset_id, modality=modality.value)


@convert_app.command()
def msd(
    source: Source,
    dataset_id: DatasetId,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """A task of the Medical Segmentation Decathlon: the folder TaskXX_Name."""
    _convert("msd", source, dataset_id, processes=processes)


def _convert(kind: str, source: Path, dataset_id: int, **options: Any) -> None:
    from masksam_nnunet.plans.datasets.convert import convert

    try:
        folder = convert(kind, source, dataset_id, **options)
    except MaskSAMError as error:
        fail(str(error))
    _done(folder, dataset_id)


@data_app.command()
def hippocampus(
    dataset_id: Annotated[int, typer.Option("-d", "--dataset", min=1, max=999, help="The new dataset's number.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the dataset, else nnUNet_raw.", show_default=False)
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Task04_Hippocampus.tar, if you have it already.", show_default=False),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A mirror: the file's address or, ending in /, its folder's.", show_default=False)
    ] = None,
) -> None:
    """MSD Task04 Hippocampus (28 MB): fetch, verify and convert it. A broken download is resumed."""
    if source is not None and url is not None:
        raise typer.BadParameter("give either --from or --url, not both")
    from masksam_nnunet.plans.datasets.hippocampus import get_hippocampus

    try:
        folder = get_hippocampus(dataset_id=dataset_id, out=out, url=url, source=source)
    except MaskSAMError as error:
        fail(str(error))
    _done(folder, dataset_id)
    typer.echo(f"for a first look: masksam demo --data {folder} --minutes 10", err=True)


def _done(folder: Path, dataset_id: int) -> None:
    """The new dataset on stdout, what to do with it on stderr."""
    typer.echo(folder)
    typer.echo(
        f"next: nnUNetv2_plan_and_preprocess -d {dataset_id} -c 3d_fullres --verify_dataset_integrity\n"
        f"then: masksam plan -d {dataset_id} -c 3d_fullres",
        err=True,
    )


def split(
    dataset_id: Annotated[
        int, typer.Option("-d", "--dataset", min=1, max=999, help="The dataset's number.", show_default=False)
    ],
    group: Annotated[
        str,
        typer.Option(
            metavar="REGEX",
            help="Finds the patient in a case's name: the group named patient, else all groups, else the match.",
            show_default=False,
        ),
    ],
    folds: Annotated[int, typer.Option(min=2, help="Number of folds.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draw; nnU-Net's by default.")] = 12345,
    force: Annotated[bool, typer.Option("--force", help="Replace another split.")] = False,
) -> None:
    """Write the splits_final.json that keeps a patient's cases together, such as --group '(patient[0-9]+)_'."""
    from masksam_nnunet.plans.datasets.split_file import split_dataset

    try:
        report = split_dataset(dataset_id, group, folds=folds, seed=seed, force=force)
    except MaskSAMError as error:
        fail(str(error))
    typer.echo(f"{report.path} {'written' if report.written else 'has this split already'}")
    typer.echo("fold  train patients (cases)  val patients (cases)")
    for number, fold in enumerate(report.folds):
        train = f"{fold.train_patients} ({fold.train_cases})"
        val = f"{fold.val_patients} ({fold.val_cases})"
        typer.echo(f"{number:<4}  {train:<22}  {val}")
    for note in report.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
