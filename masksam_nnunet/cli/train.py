"""``masksam train``: check what a training needs, then run nnU-Net's own command. Heavy imports inside."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from masksam_nnunet.errors import TrainingError, UsageError
from masksam_nnunet.stop_signals import REQUEUE, handling, pass_on

from .common import DEFAULT_TRAINER, announce_trainers

_OTHER_NETWORK = ("Key ", "The shape of the parameters of key ")
"""How nnU-Net says that pre-trained weights do not fit."""
# nnU-Net parses the arguments, its -h included.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(context_settings=_PASS_THROUGH, add_help_option=False)(train)


def train(context: typer.Context) -> None:
    """Train a fold as nnUNetv2_train does. All arguments are nnU-Net's; -tr defaults to MaskSAMTrainer."""
    arguments = context.args
    announce_trainers()
    with handling(pass_on):
        if not {"-h", "--help"} & set(arguments):
            parsed = training_parser().parse_known_args(arguments)[0]
            if parsed.tr is None:
                typer.echo(f"no -tr given: using -tr {DEFAULT_TRAINER}", err=True)
                arguments, parsed.tr = [*arguments, "-tr", DEFAULT_TRAINER], DEFAULT_TRAINER
            name, several = require_trainable(parsed)
            if several:
                place = arguments.index(parsed.dataset_name_or_id)
                arguments = [*arguments[:place], name, *arguments[place + 1 :]]
            if parsed.val and parsed.val_best and parsed.num_gpus == 1:
                return _validate_best(parsed)
        from nnunetv2.run.run_training import run_training_entry

        sys.argv = ["masksam train", *arguments]
        try:
            run_training_entry()
        except Exception as error:
            if isinstance(error, AssertionError) and str(error).startswith(_OTHER_NETWORK):
                raise TrainingError(
                    f"-pretrained_weights: {str(error).split('. ')[0]}. Only the layers of the classes may differ: it "
                    "must have the same channels, patch and settings, which nnUNetv2_move_plans_between_datasets keeps"
                ) from error
            if getattr(error, "exit_code", None) == REQUEUE:  # of a rank, in PyTorch's ProcessExitedException
                raise typer.Exit(REQUEUE) from error
            raise


def _validate_best(asked: argparse.Namespace) -> None:
    """Validate ``checkpoint_best.pth``, of an unfinished training too: nnU-Net's command asks for the final one first.

    Raises:
        TrainingError: there is none.
    """
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    fold = asked.fold if asked.fold == "all" else int(asked.fold)
    trainer = get_trainer_from_args(
        asked.dataset_name_or_id, asked.configuration, fold, asked.tr, asked.p, device=torch.device(asked.device)
    )
    best = Path(trainer.output_folder, "checkpoint_best.pth")
    if not best.is_file():
        raise TrainingError(f"--val_best: there is no {best}; train this fold first")
    trainer.load_checkpoint(str(best))
    trainer.perform_actual_validation(asked.npz)


def training_parser() -> argparse.ArgumentParser:
    """The arguments of ``nnUNetv2_train``; a test compares them with nnU-Net's own parser."""
    parser = argparse.ArgumentParser("masksam train", add_help=False)
    for name in ("dataset_name_or_id", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-pretrained_weights")
    parser.add_argument("-num_gpus", type=int, default=1)
    for flag in ("--npz", "--c", "--val", "--val_best", "--disable_checkpointing"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-device", default="cuda", choices=["cpu", "cuda", "mps"])
    return parser


def require_trainable(asked: argparse.Namespace) -> tuple[str, bool]:
    """Refuse a training that nnU-Net would end with a traceback, before it makes a folder.

    Returns:
        The dataset's full name, and whether nnU-Net finds several datasets by its number, as it takes 100 for 1001 too.

    Raises:
        MaskSAMError: an argument names what does not exist.
    """
    import torch

    from masksam_nnunet.gpu import require_devices
    from masksam_nnunet.plans.raw_data import find_dataset

    name = find_dataset(asked.dataset_name_or_id, ("nnUNet_preprocessed", "nnUNet_results"), "dataset")
    if asked.pretrained_weights is not None and not Path(asked.pretrained_weights).is_file():
        raise TrainingError(f"-pretrained_weights {asked.pretrained_weights}: there is no such file")

    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    from masksam_nnunet.inference.methods import find_trainer
    from masksam_nnunet.plans.raw_data import number_of
    from masksam_nnunet.plans.splits import SPLITS_FILE
    from masksam_nnunet.plans.training_inputs import require_cases, require_configuration

    folder, number, who = Path(os.environ["nnUNet_preprocessed"]) / name, number_of(name), f"-p {asked.p}"
    find_trainer(asked.tr, "-tr")
    found = require_configuration(folder, asked.p, asked.configuration, number, who)
    cases = require_cases(folder, asked.p, asked.configuration, found.data_identifier, number, who)
    if asked.num_gpus > found.batch_size:
        raise TrainingError(
            f"-num_gpus {asked.num_gpus}: {who} has batches of {found.batch_size}, and each GPU needs a sample; take "
            "fewer GPUs, or train a fold on each"
        )
    if asked.fold != "all":
        _require_fold(asked.fold, folder / SPLITS_FILE, cases)
    require_devices([asked.device])
    if asked.num_gpus > 1:
        there = torch.cuda.device_count() if asked.device == "cuda" else 1
        if asked.num_gpus > there:
            raise UsageError(f"-num_gpus {asked.num_gpus}: -device {asked.device} is {there} here; lower it")
        require_devices([*map(str, range(asked.num_gpus))])
    return name, len(find_candidate_datasets(number)) > 1


def _require_fold(fold: str, splits: Path, cases: Sequence[str]) -> None:
    """Refuse a fold that is not among the splits: nnU-Net would split at random, patients too."""
    from masksam_nnunet.plans.splits import NUM_FOLDS, read_splits

    if not (fold.isascii() and fold.isdecimal()):
        raise UsageError(f"fold {fold}: give a number, or all")
    if not splits.is_file() and len(cases) < NUM_FOLDS:
        raise TrainingError(
            f"fold {fold}: {len(cases)} cases are too few for nnU-Net's default {NUM_FOLDS} folds; train on all "
            f"of them (fold all), or write {splits}"
        )
    folds = len(read_splits(splits, cases)) if splits.is_file() else NUM_FOLDS
    if int(fold) >= folds:
        raise UsageError(f"fold {fold}: there are folds 0 to {folds - 1} ({splits}), or all")
