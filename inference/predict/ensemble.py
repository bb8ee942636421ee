"""Predict with several models whose probabilities are averaged by nnU-Net's own function."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.errors import CaseError, ModelError, UsageError

from ..cases import Case, channel_names
from ..methods import Method, parse_methods
from ..models import Model, previous_stage, reader_of
from .output import draft, is_whole, remove
from .postprocessing import Postprocessing
from .predict_cases import Pools, PredictOptions, predict_cases

MEMBERS = ".ensemble"
"""Folder, in that of the predictions, for the predictions of each model; averaged cases are removed from it."""


def parse_members(texts: Sequence[str], plans: str, configuration: str) -> list[Method]:
    """Read the models that ``--ensemble`` names.

    Args:
        texts: ``TRAINER[@PLANS][:CONFIGURATION]``, or a baseline's name in place of ``TRAINER[@PLANS]``.
        plans: of those that name none (``-p``).
        configuration: of those that name none (``-c``); may be empty.

    Raises:
        UsageError: fewer than two, one twice, no configuration, an unknown trainer.
    """
    members: list[Method] = []
    for text in texts:
        name, colon, own = text.partition(":")
        if not (own or configuration) or (colon and not own):
            raise UsageError(
                f"--ensemble {text}: no configuration; write TRAINER[@PLANS]:CONFIGURATION, or give one for all with -c"
            )
        (method,) = parse_methods([name], [plans], own or configuration, "--ensemble")
        if method in members:
            raise UsageError(f"--ensemble {text}: {method.key} is named twice; leave one out")
        members.append(method)
    if len(members) < 2:
        raise UsageError(f"--ensemble {' '.join(texts)}: name two models or more, or predict with -tr, -p and -c")
    return members


def check_averaging(models: Sequence[Model]) -> None:
    """Refuse models whose probabilities mean different things.

    Raises:
        ModelError: naming the models, what differs, and both values.
    """
    first = models[0]
    for other in models[1:]:
        theirs = _must_agree(other)
        for what, value in _must_agree(first).items():
            if value != theirs[what]:
                raise ModelError(
                    f"--ensemble: {first.name} and {other.name} differ in {what} ({value} and {theirs[what]}) and "
                    "cannot be averaged"
                )


def _must_agree(model: Model) -> Mapping[str, object]:
    plans, description = model.plans, model.dataset_json
    return {
        "the dataset": plans.get("dataset_name"),
        "labels": description["labels"],
        "the order of regions": description.get("regions_class_order"),
        "channels": channel_names(description),
        "the file ending": description["file_ending"],
        "the reader of images": plans.get("image_reader_writer"),
    }


def previous_stage_folders(models: Sequence[Model], output: Path, previous: Path | None) -> dict[str, Path]:
    """Find where each cascade among the models takes its previous stage's label maps from, by the cascade's name.

    Args:
        models: that predict; a cascade's previous stage may be one of them.
        output: folder of the predictions.
        previous: ``-prev_stage_predictions``.

    Raises:
        UsageError: the previous stage of a cascade is neither predicted here nor given.
    """
    names = {model.name for model in models}
    folders: dict[str, Path] = {}
    for model in models:
        stage = previous_stage(model)
        if stage is None:
            continue
        before = f"{model.name.removesuffix(model.configuration)}{stage}"
        if previous is None and before not in names:
            raise UsageError(
                f"{model.name} is a cascade: give the predictions of {before} with -prev_stage_predictions FOLDER, or "
                "add that model to --ensemble"
            )
        folders[model.name] = previous or output / MEMBERS / before
    return folders


def predict_ensemble(
    models: Sequence[Model],
    cases: Sequence[Case],
    output: Path,
    options: PredictOptions,
    pools: Pools,
    stages: Mapping[str, Path],
) -> dict[str, str]:
    """Write the label map of each case; one model is in memory at a time.

    Args:
        models: two or more that passed :func:`check_averaging`.
        cases: to predict.
        output: folder of the predictions.
        options: of the predictor and of the result; with ``resume``, what a model has predicted already is kept.
        pools: of worker processes.
        stages: see :func:`previous_stage_folders`.

    Returns:
        Why cases have no prediction, by name.

    Raises:
        UsageError: the disk is full or not writable.
    """
    models = sorted(models, key=lambda model: model.name in stages)  # a cascade after its previous stage
    of_members = replace(options, probabilities=True, postprocessing=None)
    failed: dict[str, str] = {}
    for model in models:
        folder, ending, reader = output / MEMBERS / model.name, model.dataset_json["file_ending"], reader_of(model)
        wanted = [case for case in cases if case.name not in failed]
        if not options.resume:
            for case in wanted:
                remove(folder / case.name, ending)
        wanted = [case for case in wanted if not is_whole(folder / case.name, ending, reader, True)]
        if wanted:
            print(f"{model.name}: {len(wanted)} cases", flush=True)
            predictor = options.predictor(model)
            failed |= predict_cases(predictor, wanted, folder, of_members, pools, stages.get(model.name))
            del predictor
    failed |= _merge([case for case in cases if case.name not in failed], models, output, options, pools)
    if not any(file.is_file() for file in (output / MEMBERS).rglob("*")):
        shutil.rmtree(output / MEMBERS, ignore_errors=True)
    return failed


def _merge(
    cases: Sequence[Case], models: Sequence[Model], output: Path, options: PredictOptions, pools: Pools
) -> dict[str, str]:
    plans, dataset_json = PlansManager(models[0].plans), models[0].dataset_json
    settings = (plans, dataset_json, options.probabilities, options.postprocessing)
    folders = [output / MEMBERS / model.name for model in models]
    calls = [(c.name, ([folder / c.name for folder in folders], output / c.name, *settings)) for c in cases]
    return {
        name: f"the models' predictions cannot be averaged: {outcome}"
        for name, outcome in pools.writers.outcomes(merge_case, calls)
        if isinstance(outcome, CaseError)
    }


def merge_case(
    members: Sequence[Path],
    target: Path,
    plans: Any,
    dataset_json: Mapping[str, Any],
    probabilities: bool,
    postprocessing: Postprocessing | None,
) -> None:
    """Average the members' probabilities of one case, then remove them; the rest is as in ``export_case``.

    Args:
        members: for each model, folder and name of the case.
        target: folder and name of the result.
        plans: nnU-Net's PlansManager.
        dataset_json: of the dataset.
        probabilities: write the average too.
        postprocessing: applied to the label map.
    """
    ending, reader = dataset_json["file_ending"], plans.image_reader_writer_class()
    labels, archives = plans.get_label_manager(dataset_json), [f"{member}.npz" for member in members]
    with draft(target, ending, reader, probabilities, postprocessing) as name:
        merge_files(archives, str(name), ending, reader, labels, probabilities)
    for member in members:
        remove(member, ending)
