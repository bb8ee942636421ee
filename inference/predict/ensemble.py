"""Several models average their probabilities, by nnU-Net's own function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.errors import BenchmarkError, CaseError, PredictError
from masksam_nnunet.inference.methods import Method

from ..cases import Case
from ..methods import parse_methods
from ..models import Model, check_averaging, previous_stage, reader_of
from ..predictor import MaskSAMPredictor
from .output import draft, is_whole, remove
from .run import Crew, PredictOptions, predict_cases

MEMBERS = ".ensemble"
"""Folder, in that of the predictions, of what the members predict; what has been averaged is removed from it."""


def parse_members(texts: Sequence[str], plans: str, configuration: str) -> list[Method]:
    """The models that ``--ensemble`` names.

    Args:
        texts: ``TRAINER[@PLANS][:CONFIGURATION]``, or the benchmark's names of baselines.
        plans: of those that name none (``-p``).
        configuration: of those that name none (``-c``); may be empty.

    Raises:
        PredictError: fewer than two, one twice, no configuration, an unknown trainer.
    """
    members: list[Method] = []
    for text in texts:
        name, colon, own = text.partition(":")
        if not (own or configuration) or (colon and not own):
            raise PredictError(
                f"--ensemble {text}: no configuration; write TRAINER[@PLANS]:CONFIGURATION, for example "
                f"{name or 'nnUNetTrainer'}:3d_fullres, or give one for all with -c"
            )
        try:
            (method,) = parse_methods([name], [plans], own or configuration, "--ensemble")
        except BenchmarkError as error:
            raise PredictError(str(error)) from error
        if method in members:
            raise PredictError(f"--ensemble: {text} names {method.key}, which is named before; leave one out")
        members.append(method)
    if len(members) < 2:
        raise PredictError(
            f"--ensemble {' '.join(texts)}: two models or more are averaged; add one, or predict with -tr, -p and -c"
        )
    return members


@dataclass(frozen=True)
class Ensemble:
    """Models in the order in which they predict: a cascade after its previous stage.

    Attributes:
        models: two or more.
        stages: for the models that are cascades, the folder of the label maps of their previous stage.
    """

    models: Sequence[Model]
    stages: Mapping[str, Path]

    @classmethod
    def of(cls, models: Sequence[Model], out: Path, previous: Path | None) -> Ensemble:
        """Check all that can be checked before anything is predicted.

        Args:
            models: to average.
            out: folder of the predictions.
            previous: label maps of the cascades' previous stage, where the user has some.

        Raises:
            PredictError: models that cannot be averaged, a cascade without its previous stage.
        """
        check_averaging(models)
        names = {model.name for model in models}
        stages: dict[str, Path] = {}
        for model in models:
            stage = previous_stage(model)
            if stage is None:
                continue
            before = f"{model.name.removesuffix(model.configuration)}{stage}"
            if previous is None and before not in names:
                trainer, plans, _ = model.name.split("__")
                raise PredictError(
                    f"--ensemble: {model.name} is a cascade and needs the predictions of {before}: add "
                    f"{trainer}@{plans}:{stage} to the ensemble, or give -prev_stage_predictions FOLDER"
                )
            stages[model.name] = previous or out / MEMBERS / before
        return cls(sorted(models, key=lambda model: model.name in stages), stages)


def predict_ensemble(
    ensemble: Ensemble,
    make_predictor: Callable[[], MaskSAMPredictor],
    cases: Sequence[Case],
    out: Path,
    resume: bool,
    options: PredictOptions,
    crew: Crew,
) -> dict[str, str]:
    """Write the label map of each case, once it is whole; one model is in memory at a time.

    Args:
        ensemble: the models.
        make_predictor: for each model anew.
        cases: to predict.
        out: folder of the predictions.
        resume: take what a model has predicted already.
        options: for the result.
        crew: of these options.

    Returns:
        What was wrong, by name, of the cases that have no prediction now.

    Raises:
        PredictError: the disk is full or not writable.
    """
    failed: dict[str, str] = {}
    of_members = replace(options, probabilities=True, postprocessing=None)
    folders = [out / MEMBERS / model.name for model in ensemble.models]
    for model, folder in zip(ensemble.models, folders, strict=True):
        ending, reader = model.dataset_json["file_ending"], reader_of(model)
        wanted = [case for case in cases if case.name not in failed]
        if not resume:
            for case in wanted:
                remove(folder / case.name, ending)
        wanted = [case for case in wanted if not is_whole(folder / case.name, ending, reader, True)]
        if not wanted:
            continue
        print(f"{model.name}: {len(wanted)} cases", flush=True)
        predictor = make_predictor()
        model.load(predictor)
        stage = ensemble.stages.get(model.name)
        failed |= predict_cases(predictor, wanted, folder, of_members, crew, stage)
        del predictor
    whole = [case for case in cases if case.name not in failed]
    failed |= _merge(ensemble.models, folders, whole, out, options, crew)
    _remove_empty(out / MEMBERS)
    return failed


def merge_case(
    members: Sequence[Path],
    target: Path,
    plans: Any,
    dataset_json: Mapping[str, Any],
    options: PredictOptions,
) -> None:
    """Average the members' probabilities of one case; then remove these.

    Args:
        members: each folder and name of the case.
        target: folder and name of the result.
        plans: nnU-Net's PlansManager.
        dataset_json: of the dataset.
        options: for the result.

    Raises:
        PredictError: the disk is full or not writable.
    """
    ending, reader = dataset_json["file_ending"], plans.image_reader_writer_class()
    with draft(target, ending, reader, options.probabilities) as name:
        merge_files(
            [f"{member}.npz" for member in members], str(name), ending, reader, plans.get_label_manager(dataset_json),
            options.probabilities,
        )  # fmt: skip
        if options.postprocessing is not None:
            options.postprocessing.apply(name.with_name(name.name + ending), reader)
    for member in members:
        remove(member, ending)


def _merge(
    models: Sequence[Model],
    folders: Sequence[Path],
    cases: Sequence[Case],
    out: Path,
    options: PredictOptions,
    crew: Crew,
) -> dict[str, str]:
    failed = {}
    plans = PlansManager(models[0].plans)
    calls = [
        ([folder / case.name for folder in folders], out / case.name, plans, models[0].dataset_json, options)
        for case in cases
    ]
    for case, task in zip(cases, crew.writers.in_order(merge_case, calls), strict=True):
        try:
            crew.writers.result(task)
        except CaseError as error:
            failed[case.name] = f"the models' predictions cannot be averaged: {error}"
    return failed


def _remove_empty(folder: Path) -> None:
    """Once no case is left in it."""
    if not any(file.is_file() for file in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
