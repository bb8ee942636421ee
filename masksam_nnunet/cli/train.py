"""``masksam train``: check what a training needs, then run nnU-Net's own command. Heavy imports inside."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import typer

from masksam_nnunet.errors import TrainingError
from masksam_nnunet.stop_signals import REQUEUE, handling, pass_on

from .common import DEFAULT_TRAINER, announce_trainers, require_device

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
            require_trainable(parsed)
        from nnunetv2.run.run_training import run_training_entry

        sys.argv = ["masksam train", *arguments]
        try:
            run_training_entry()
        except Exception as error:
            if getattr(error, "exit_code", None) == REQUEUE:  # of a rank, in PyTorch's ProcessExitedException
                raise typer.Exit(REQUEUE) from error
            raise


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


def require_trainable(asked: argparse.Namespace) -> None:
    """Refuse a training that nnU-Net would end with a traceback, before it makes a folder.

    Raises:
        MaskSAMError: an argument names what does not exist.
    """
    from masksam_nnunet.plans.planning import find_dataset

    name = find_dataset(asked.dataset_name_or_id, ("nnUNet_preprocessed", "nnUNet_results"), "dataset")
    require_device(asked.device)
    if asked.pretrained_weights is not None and not Path(asked.pretrained_weights).is_file():
        raise TrainingError(f"-pretrained_weights {asked.pretrained_weights}: there is no such file")

    from masksam_nnunet.inference.methods import find_trainer
    from masksam_nnunet.plans.raw_data import number_of
    from masksam_nnunet.plans.splits import NUM_FOLDS
    from masksam_nnunet.plans.training_inputs import require_cases, require_configuration

    folder, number, who = Path(os.environ["nnUNet_preprocessed"]) / name, number_of(name), f"-p {asked.p}"
    find_trainer(asked.tr, "-tr")
    found = require_configuration(folder, asked.p, asked.configuration, number, who)
    cases = require_cases(folder, asked.p, asked.configuration, found.data_identifier, number, who)
    splits = folder / "splits_final.json"
    if asked.fold != "all" and not splits.is_file() and len(cases) < NUM_FOLDS:
        raise TrainingError(
            f"fold {asked.fold}: {len(cases)} cases are too few for nnU-Net's default {NUM_FOLDS} folds; train on all "
            f"of them (fold all), or write {splits}"
        )
