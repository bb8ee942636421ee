"""Predict the images of a folder with one model or an ensemble."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import read_json, write_json

from ..cases import Case, find_cases
from ..models import Model, reader_of
from .ensemble import check_averaging, predict_ensemble, previous_stage_folders
from .output import is_whole, remove
from .predict_cases import Pools, PredictOptions, predict_cases
from .workers import Workers

ARGUMENTS = "predict_from_raw_data_args.json"
"""nnU-Net's file that says how the predictions of a folder were made."""


def predict(models: Sequence[Model], images: Path, output: Path, options: PredictOptions) -> dict[str, str]:
    """Write a label map for each case, and nnU-Net's dataset.json, plans.json and arguments.

    Everything that can be checked is checked before a model is loaded or the output folder is made.

    Args:
        models: one, or an ensemble whose probabilities are averaged.
        images: folder of ``CASE_0000`` + file ending.
        output: folder of the predictions.
        options: see there.

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
    stages = previous_stage_folders(models, output, options.previous)
    ending, reader = models[0].dataset_json["file_ending"], reader_of(models[0])
    cases, failed = find_cases(images, ending)
    if output.is_dir() and output.samefile(images):
        raise UsageError(f"-o {output} is the folder of the images (-i): name another one")
    _make_writable(output)

    cases = cases[options.part :: options.parts]
    wanted = cases
    if options.resume:
        _check_same_models(output, _identity(models, options))
        wanted = [case for case in cases if not is_whole(output / case.name, ending, reader, options.probabilities)]
    print(f"{len(wanted)} cases to predict; {len(cases) - len(wanted)} were done before", flush=True)
    if not wanted:
        return failed

    with Workers(options.preprocessing_processes) as readers, Workers(options.export_processes) as writers:
        pools = Pools(readers, writers)
        if len(models) > 1:
            _replace(wanted, models, images, output, options)
            return failed | predict_ensemble(models, wanted, output, options, pools, stages)
        predictor = options.predictor(models[0])
        _replace(wanted, models, images, output, options)
        return failed | predict_cases(predictor, wanted, output, options, pools, stages.get(models[0].name))


def _make_writable(folder: Path) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"-o {folder}: cannot write there ({error.strerror or error}); name another folder") from error


def _identity(models: Sequence[Model], options: PredictOptions) -> dict[str, Any]:
    """What predictions depend on, as JSON."""
    return {
        "models": [model.describe() for model in models],
        "postprocessing": str(options.postprocessing.file) if options.postprocessing else None,
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
    if before is not None and before != now:
        differing = next(key for key in now if before.get(key) != now[key])
        raise UsageError(
            f"--continue_prediction: {output} holds predictions with {differing} = {before.get(differing)}, now it is "
            f"{now[differing]}; leave the option out to replace them, or name another folder (-o)"
        )


def _replace(
    cases: Sequence[Case], models: Sequence[Model], images: Path, output: Path, options: PredictOptions
) -> None:
    """Remove earlier predictions of the cases, then record what predicts them.

    All at once: if this run is interrupted, an earlier run's predictions would pass for this one's.
    """
    for case in cases:
        remove(output / case.name, models[0].dataset_json["file_ending"])
    arguments = {  # with nnU-Net's names
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
    write_json(output / "plans.json", models[0].plans)
