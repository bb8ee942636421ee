"""Predict the images of a folder with one model or an ensemble."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.errors import CaseError, ModelError, UsageError
from masksam_nnunet.files import read_json, write_json, write_text_atomically

from ..cases import Case, channel_names, find_cases
from ..models import Model, previous_stage
from .output import Predictions
from .predict_cases import Pools, PredictOptions, predict_cases
from .workers import Workers

ARGUMENTS = "predict_from_raw_data_args.json"
"""nnU-Net's file that says how the predictions of a folder were made."""
MEMBERS = ".ensemble"
"""Folder, in that of the predictions, for the predictions of each model; averaged cases are removed from it."""


def predict(models: Sequence[Model], images: Path, output: Path, options: PredictOptions) -> dict[str, str]:
    """Write a label map for each case, and nnU-Net's dataset.json, plans.json and arguments.

    Everything that can be checked is checked before a model is loaded or the output folder is made.

    Args:
        models: one, or an ensemble whose probabilities are averaged.
        images: folder of ``CASE_0000`` + file ending.
        output: folder of the predictions.
        options: of the predictor and of what is written.

    Returns:
        Why cases have no prediction, by name; empty if all have one.

    Raises:
        UsageError: an option or a folder cannot be used, or the disk is full.
        ModelError: a model is incomplete or damaged, or models cannot be averaged.
    """
    for model in models:
        model.check()
    check_averaging(models)
    if not 0 <= options.part < options.parts:
        raise UsageError(f"-part_id {options.part}: parts are numbered from 0 to {options.parts - 1} (-num_parts)")
    if options.previous is not None and not options.previous.is_dir():
        raise UsageError(f"-prev_stage_predictions {options.previous}: there is no such folder")
    if not 0 < options.step_size <= 1:
        raise UsageError(f"-step_size {options.step_size:g}: give a share of the patch, above 0 and up to 1")
    stages = previous_stage_folders(models, output, options.previous)
    ending, plans = models[0].dataset_json["file_ending"], PlansManager(models[0].plans)
    made = Predictions(output, ending, plans.image_reader_writer_class(), options.probabilities, options.postprocessing)
    cases, failed = find_cases(images, ending)
    for option, read in (("-i", images), ("-prev_stage_predictions", options.previous)):
        if read is not None and output.is_dir() and output.samefile(read):
            raise UsageError(f"-o {output} is the folder of {option}: name another one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UsageError(f"-o {output}: cannot write there ({error.strerror or error}); name another folder") from error

    cases = wanted = cases[options.part :: options.parts]
    if options.resume:
        _check_same_models(output, _identity(models, options))
        wanted = [case for case in cases if not made.is_whole(case.name)]
    print(f"{len(wanted)} cases to predict; {len(cases) - len(wanted)} were done before", flush=True)
    if not wanted:
        return failed

    predictor = options.predictor(models[0]) if len(models) == 1 else None
    # Earlier predictions go all at once: if this run is interrupted, they would pass for its own.
    for case in wanted:
        made.remove(case.name)
    _record(models, images, output, options)
    with Workers(options.preprocessing_processes) as readers, Workers(options.export_processes) as writers:
        pools = Pools(readers, writers)
        if predictor is None:
            return failed | predict_ensemble(models, wanted, made, options, pools, stages)
        return failed | predict_cases(predictor, wanted, made, pools, stages.get(models[0].name))


def _identity(models: Sequence[Model], options: PredictOptions) -> dict[str, Any]:
    """What predictions depend on, as JSON."""
    return {
        "models": [model.describe() for model in models],
        "postprocessing": str(options.postprocessing.file) if options.postprocessing else None,
        "previous_stage": str(options.previous) if options.previous else None,
        "tile_step_size": options.step_size,
        "use_mirroring": options.mirroring,
    }


def _check_same_models(output: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue predictions that were made in another way."""
    file = output / ARGUMENTS
    try:
        before = read_json(file).get("masksam") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--continue_prediction: {file}, which says what predicted the cases, cannot be read ({error}); leave the "
            "option out, or name another folder (-o)"
        ) from error
    now = json.loads(json.dumps(identity))
    if before is None:
        return
    differing = next((key for key in now if before.get(key) != now[key]), None)
    if differing is not None:
        raise UsageError(
            f"--continue_prediction: {output} holds predictions with {differing} = {before.get(differing)}, now it is "
            f"{now[differing]}; leave the option out to replace them, or name another folder (-o)"
        )


def _record(models: Sequence[Model], images: Path, output: Path, options: PredictOptions) -> None:
    """Write what predicts into the folder, with nnU-Net's file names and words."""
    arguments = {
        "list_of_lists_or_source_folder": str(images),
        "output_folder_or_list_of_truncated_output_files": str(output),
        "save_probabilities": options.probabilities,
        "overwrite": not options.resume,
        "num_processes_preprocessing": options.preprocessing_processes,
        "num_processes_segmentation_export": options.export_processes,
        "folder_with_segs_from_prev_stage": None if options.previous is None else str(options.previous),
        "num_parts": options.parts,
        "part_id": options.part,
        "masksam": _identity(models, options),
    }
    write_json(output / ARGUMENTS, arguments)
    write_json(output / "dataset.json", models[0].dataset_json)
    plans = json.dumps(models[0].plans, indent=4)  # which may hold NaN, where no case has foreground
    write_text_atomically(output / "plans.json", plans + "\n")


# ---- ensembles -------------------------------------------------------------------------------------------------------


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
    order = description.get("regions_class_order")
    return {
        "the dataset": plans.get("dataset_name"),
        "labels": description["labels"],
        "the order of regions": order and (order, list(description["labels"])),
        "channels": channel_names(description),
        "the file ending": description["file_ending"],
        "the reader of images": plans.get("image_reader_writer"),
    }


def previous_stage_folders(models: Sequence[Model], output: Path, previous: Path | None) -> dict[str, Path]:
    """Find where each cascade among the models takes its previous stage's label maps from, by the cascade's name.

    That is the folder ``previous`` if given, else that of another model whose predictions go to ``output``.

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
    output: Predictions,
    options: PredictOptions,
    pools: Pools,
    stages: Mapping[str, Path],
) -> dict[str, str]:
    """Predict with each model, one in memory at a time, and average; like ``predict_cases``.

    The models have passed :func:`check_averaging`; with ``options.resume``, what one has predicted already is kept.
    ``stages`` come from :func:`previous_stage_folders`.
    """
    models = sorted(models, key=lambda model: model.name in stages)  # a cascade after its previous stage
    hidden = output.folder / MEMBERS
    members = [replace(output, folder=hidden / model.name, probabilities=True, postprocessing=None) for model in models]
    failed: dict[str, str] = {}
    for member in members if not options.resume else ():  # all at once, as above
        for case in cases:
            member.remove(case.name)
    for model, member in zip(models, members, strict=True):
        wanted = [case for case in cases if case.name not in failed and not member.is_whole(case.name)]
        if wanted:
            print(f"{model.name}: {len(wanted)} cases", flush=True)
            predictor = options.predictor(model)
            failed |= predict_cases(predictor, wanted, member, pools, stages.get(model.name))
            del predictor
    labels = PlansManager(models[0].plans).get_label_manager(models[0].dataset_json)
    calls = [(case.name, (output, case.name, members, labels)) for case in cases if case.name not in failed]
    for name, outcome in pools.writers.outcomes(merge_case, calls):
        if isinstance(outcome, CaseError):
            failed[name] = f"the models' predictions cannot be averaged: {outcome}"
    for folder in (*(member.folder for member in members), hidden):
        with contextlib.suppress(OSError):  # not empty: of failed cases, or of another part (-num_parts)
            folder.rmdir()
    return failed


def merge_case(output: Predictions, case: str, members: Sequence[Predictions], labels: Any) -> None:
    """Average the members' probabilities of a case by nnU-Net's own function and label manager, then remove them."""
    archives = [str(member.files(case)[0]) for member in members]
    with output.draft(case) as name:
        merge_files(archives, str(name), output.ending, output.reader, labels, output.probabilities)
    for member in members:
        member.remove(case)
