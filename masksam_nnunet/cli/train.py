"""``masksam train``: check what a training needs, then run nnU-Net's own command. Heavy imports inside."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import typer

from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import MaskSAMError, TrainingError
from masksam_nnunet.stop_signals import REQUEUE, passed_on

from .common import DEFAULT_TRAINER, ext_trainer_or_fail, fail, require_device

# nnU-Net parses the arguments, its -h included.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(context_settings=_PASS_THROUGH, add_help_option=False)(train)


def train(context: typer.Context) -> None:
    """Train a fold as nnUNetv2_train does. All arguments are nnU-Net's; -tr defaults to MaskSAMTrainer."""
    arguments = context.args
    # In the environment, not only here: the worker processes that nnU-Net spawns look trainers up too.
    os.environ[EXT_TRAINER] = ext_trainer_or_fail()
    with passed_on():
        try:
            if not {"-h", "--help"} & set(arguments):
                parsed = training_parser().parse_known_args(arguments)[0]
                if parsed.tr is None:
                    typer.echo(f"no -tr given: using -tr {DEFAULT_TRAINER}", err=True)
                    arguments, parsed.tr = [*arguments, "-tr", DEFAULT_TRAINER], DEFAULT_TRAINER
                require_trainable(parsed)
            from nnunetv2.run.run_training import run_training_entry

            sys.argv = ["masksam train", *arguments]
            run_training_entry()
        except MaskSAMError as error:
            fail(str(error))
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
        MaskSAMError: an argument names what does not exist, or contradicts another.
    """
    missing = [name for name in ("nnUNet_preprocessed", "nnUNet_results") if not os.environ.get(name)]
    if missing:
        raise TrainingError(f"{' and '.join(missing)} not set: export nnU-Net's folders first")
    if asked.fold != "all" and not asked.fold.isdecimal():
        raise TrainingError(f"fold {asked.fold}: give a number from 0 on, or all")
    for other, given in (("--val", asked.val), ("-pretrained_weights", asked.pretrained_weights is not None)):
        if asked.c and given:
            raise TrainingError(f"--c and {other} do not go together: leave one out")
    if asked.pretrained_weights is not None and not Path(asked.pretrained_weights).is_file():
        raise TrainingError(f"-pretrained_weights {asked.pretrained_weights}: there is no such file")
    require_device(asked.device)
    _require_inputs(asked)


def _require_inputs(asked: argparse.Namespace) -> None:
    from masksam_nnunet.inference.methods import Method, find_trainer
    from masksam_nnunet.plans.raw_data import number_of
    from masksam_nnunet.plans.splits import NUM_FOLDS
    from masksam_nnunet.plans.training_inputs import require_cases, require_configuration

    name = _preprocessed_dataset(asked.dataset_name_or_id)
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
    model = Path(os.environ["nnUNet_results"]) / name / Method(asked.tr, asked.p, asked.configuration).key
    final = model / f"fold_{asked.fold}" / "checkpoint_final.pth"
    if asked.val and not final.is_file():
        raise TrainingError(f"--val: there is no {final}: the training is not finished; continue it with --c")


def _preprocessed_dataset(dataset: str) -> str:
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset))
    except (RuntimeError, AssertionError, ValueError) as error:
        if "More than one" in str(error):
            raise TrainingError(f"{' '.join(str(error).split())}. Or give its name in place of {dataset}") from error
        name = ""
    if not name or not (preprocessed / name).is_dir():
        there = sorted(folder.name for folder in preprocessed.glob("Dataset*"))
        raise TrainingError(
            f"{dataset}: no such dataset in nnUNet_preprocessed = {preprocessed}, only: {', '.join(there) or 'none'}; "
            f"make it with nnUNetv2_plan_and_preprocess -d {dataset}"
        )
    return name
