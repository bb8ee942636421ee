"""``masksam train``: nnU-Net's training, with what it needs looked for before it makes a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from masksam_nnunet.errors import BenchmarkError, DataError, TrainingError
from masksam_nnunet.inference.methods import find_trainer
from masksam_nnunet.plans.raw_data import number_of
from masksam_nnunet.plans.splits import NUM_FOLDS
from masksam_nnunet.plans.training_inputs import require_cases, require_configuration

_FINAL = "checkpoint_final.pth"


def require_trainable(
    dataset: str,
    configuration: str,
    fold: str,
    trainer: str,
    plans: str,
    pretrained: str | None = None,
    num_gpus: int = 1,
    probabilities: bool = False,
    goes_on: bool = False,
    only_validates: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    """Refuse a training that nnU-Net would end with a traceback; the arguments are those of its ``run_training``.

    Raises:
        TrainingError: an argument names what is not there, or what contradicts another.
    """
    if fold != "all" and not str(fold).isdecimal():
        raise TrainingError(f"fold {fold}: give a number from 0 on, or all")
    for other, given in (("--val", only_validates), ("-pretrained_weights", pretrained is not None)):
        if goes_on and given:
            raise TrainingError(f"--c and {other} do not go together: leave one out")
    if pretrained is not None and not Path(pretrained).is_file():
        raise TrainingError(f"-pretrained_weights {pretrained}: there is no such file")
    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    name = _dataset(dataset, preprocessed)
    folder, number = preprocessed / name, number_of(name)
    who = f"-p {plans}"
    try:
        find_trainer(trainer, "-tr")
        found = require_configuration(folder, plans, configuration, number, who)
        cases = require_cases(folder, plans, configuration, found.data_identifier, number, who)
    except (DataError, BenchmarkError) as error:
        raise TrainingError(str(error)) from error
    splits = folder / "splits_final.json"
    if fold != "all" and not splits.is_file() and len(cases) < NUM_FOLDS:
        raise TrainingError(
            f"fold {fold}: {len(cases)} cases, and nnU-Net's default split has {NUM_FOLDS} folds; train on all of them "
            f"(fold all), or write {splits} with fewer folds"
        )
    model = Path(os.environ["nnUNet_results"]) / name / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"
    if only_validates and not (model / _FINAL).is_file():
        raise TrainingError(f"--val: there is no {model / _FINAL}: the training is not finished; go on with it (--c)")


def _dataset(dataset: str, preprocessed: Path) -> str:
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset))
    except (RuntimeError, AssertionError, ValueError) as error:
        if "More than one" in str(error):
            raise TrainingError(f"{' '.join(str(error).split())}. Or give its name in place of {dataset}") from error
        name = ""
    if not name or not (preprocessed / name).is_dir():
        there = sorted(folder.name for folder in preprocessed.glob("Dataset*")) if preprocessed.is_dir() else []
        raise TrainingError(
            f"{dataset}: no such dataset in nnUNet_preprocessed = {preprocessed}, which holds "
            f"{', '.join(there) or 'none'}; plan and preprocess it first: nnUNetv2_plan_and_preprocess -d {dataset}"
        )
    return name
