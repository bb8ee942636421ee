"""``masksam predict``: nnU-Net's options and a few more. Heavy imports inside the command."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from masksam_nnunet.environment import cores
from masksam_nnunet.errors import UsageError

from .common import DEFAULT_TRAINER, Checkpoint, Plans, PreviousStage, SeveralValues, announce_trainers, fail

if TYPE_CHECKING:
    from masksam_nnunet.inference.models import Model
    from masksam_nnunet.inference.predict.postprocessing import Postprocessing


Device = StrEnum("Device", ["cuda", "cpu", "mps"])


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=SeveralValues)(predict)


def predict(
    images: Annotated[Path, typer.Option("-i", "--images", help="Folder of the images, CASE_0000, ...")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for the predictions.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="The dataset's number or name.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="nnU-Net's configuration.")] = None,
    trainer: Annotated[
        str | None, typer.Option("-tr", "--trainer", help="Trainer class.", show_default=DEFAULT_TRAINER)
    ] = None,
    plans: Plans = "nnUNetPlans",
    folds: Annotated[
        list[str] | None,
        typer.Option("-f", "--folds", metavar="FOLD", help="One or more, averaged, or all.", show_default="0 1 2 3 4"),
    ] = None,
    checkpoint: Checkpoint = "checkpoint_final.pth",
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble",
            metavar="TRAINER[@PLANS][:CONFIGURATION]",
            help="Two models or more whose probabilities are averaged, instead of -tr; -p and -c serve those that name "
            "none. Trainers or baselines, as in masksam benchmark --trainers.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="FOLDER",
            help="A portable model, instead of -d, -c and -tr; -p and -chk are ignored. All of its folds without -f.",
        ),
    ] = None,
    postprocessing: Annotated[
        str | None,
        typer.Option(
            "--postprocessing",
            metavar="FILE|auto",
            help="A postprocessing.pkl of nnU-Net; auto: the one of these models' cross-validation.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Windows and their mirrors at once; halved when memory runs out.",
            show_default="from device and patch",
        ),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save_probabilities", "--keep-probabilities", help="Write probabilities too.")
    ] = False,
    continue_prediction: Annotated[
        bool, typer.Option("--continue_prediction", help="Predict only cases without a whole prediction.")
    ] = False,
    step_size: Annotated[
        float, typer.Option("-step_size", "--step-size", help="Distance of windows, in patches.")
    ] = 0.5,
    disable_tta: Annotated[
        bool, typer.Option("--disable_tta", "--no-mirroring", help="No mirroring: faster, less accurate.")
    ] = False,
    previous: PreviousStage = None,
    npp: Annotated[int, typer.Option("-npp", min=0, envvar="nnUNet_npp", help="Preprocessing processes, or 0.")] = 3,
    nps: Annotated[int, typer.Option("-nps", min=0, envvar="nnUNet_nps", help="Export processes, or 0.")] = 3,
    num_parts: Annotated[int, typer.Option("-num_parts", min=1, help="Commands that share the cases.")] = 1,
    part_id: Annotated[int, typer.Option("-part_id", min=0, help="Which of them this is, from 0.")] = 0,
    device: Annotated[
        Device, typer.Option("-device", "--device", help="Choose a GPU by CUDA_VISIBLE_DEVICES.")
    ] = Device.cuda,
    not_on_device: Annotated[
        bool, typer.Option("--not_on_device", help="Keep results in main memory, for cases too large for the GPU.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what nnU-Net does.")] = False,
    disable_progress_bar: Annotated[bool, typer.Option("--disable_progress_bar", help="No progress bars.")] = False,
) -> None:
    """Predict with one model or an ensemble. Options are those of nnUNetv2_predict and a few more.

    A case that cannot be predicted does not stop the others: the command ends with their list and exit code 1.
    """
    announce_trainers()
    import torch

    from masksam_nnunet.gpu import require_devices
    from masksam_nnunet.inference.export.load import PortableModel
    from masksam_nnunet.inference.methods import ModelName, parse_members
    from masksam_nnunet.inference.models import TrainedModel, parse_folds, trained_models
    from masksam_nnunet.inference.predict.postprocessing import find_postprocessing, read_postprocessing
    from masksam_nnunet.inference.predict.predict_cases import PredictOptions
    from masksam_nnunet.inference.predict.run import predict as predict_folder

    require_devices([device.value])
    if device is not Device.mps:  # as nnU-Net's command
        torch.set_num_threads(cores() if device is Device.cpu else 1)
    numbers = parse_folds(folds or "01234")
    models: Sequence[Model]
    if model is not None:
        if dataset or configuration or trainer or ensemble:
            raise UsageError(f"--model {model} names the model: leave -d, -c, -tr and --ensemble out")
        models = [PortableModel(model, numbers if folds else None)]
    elif not dataset or not (configuration or ensemble):
        raise UsageError(f"name the model with -d and -c, or with --model; {'-c' if dataset else '-d'} is missing")
    elif ensemble and trainer:
        raise UsageError(f"-tr {trainer}: --ensemble names the trainers; leave -tr out")
    else:
        alone = [ModelName(trainer or DEFAULT_TRAINER, plans, configuration or "")]
        methods = parse_members(ensemble, plans, configuration or "") if ensemble else alone
        models = trained_models(dataset, methods, numbers, checkpoint)
    if postprocessing == "auto":
        trained = [member.folder for member in models if isinstance(member, TrainedModel)]
        if not trained:
            raise UsageError("--postprocessing auto: a portable model holds none; name a postprocessing.pkl")
        chosen: Postprocessing | None = find_postprocessing(trained, numbers)
    else:
        chosen = read_postprocessing(Path(postprocessing)) if postprocessing else None
    options = PredictOptions(
        device=device,
        step_size=step_size,
        mirroring=not disable_tta,
        on_device=not not_on_device,
        batch_size=batch_size,
        verbose=verbose,
        progress=not disable_progress_bar,
        probabilities=save_probabilities,
        resume=continue_prediction,
        preprocessing_processes=npp,
        export_processes=nps,
        previous=previous,
        parts=num_parts,
        part=part_id,
        postprocessing=chosen,
    )
    failed = predict_folder(models, images, output, options)
    if failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(failed.items()))
        fail(
            f"{len(failed)} of the cases could not be predicted:\n{lines}\n"
            f"The others are in {output}. Correct these and add --continue_prediction"
        )
