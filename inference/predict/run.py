"""Predict cases one after another, by nnU-Net's own steps; one that fails costs itself only."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import NDArray

from masksam_nnunet.errors import CaseError, PredictError, in_short

from ..cases import Case, preprocess_case
from ..predictor import MaskSAMPredictor
from .output import draft
from .postprocessing import Postprocessing
from .workers import Task, Workers

_WAITING = 2
"""Predictions that may wait for a free export process: they are large, and the network can be faster."""


@dataclass(frozen=True)
class PredictOptions:
    """How cases are predicted and written.

    Attributes:
        probabilities: write nnU-Net's ``CASE.npz`` and ``CASE.pkl`` too.
        preprocessing: processes that read and preprocess; 0 for none but this one.
        export: processes that resample and write; 0 for none but this one.
        postprocessing: done on the label maps.
    """

    probabilities: bool = False
    preprocessing: int = 0
    export: int = 0
    postprocessing: Postprocessing | None = None


class Crew(contextlib.ExitStack):
    """The processes of these options, for one model after another: they take seconds to start."""

    def __init__(self, options: PredictOptions) -> None:
        super().__init__()
        self.readers = self.enter_context(Workers(options.preprocessing))
        self.writers = self.enter_context(Workers(options.export))


def predict_cases(
    predictor: MaskSAMPredictor,
    cases: Sequence[Case],
    out: Path,
    options: PredictOptions,
    crew: Crew,
    previous: Path | None = None,
) -> dict[str, str]:
    """Write the label map of each case, ``CASE`` + the dataset's file ending, once it is whole.

    Args:
        predictor: with a model loaded.
        cases: to predict.
        out: folder of the predictions; made if it is missing.
        options: see there.
        crew: of these options.
        previous: for a cascade, the folder of the previous stage's label maps.

    Returns:
        What was wrong, by name, of the cases that have no prediction now.

    Raises:
        PredictError: the disk is full or not writable.
    """
    plans, configuration, dataset_json = (
        predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )  # fmt: skip
    failed: dict[str, str] = {}
    exports: deque[tuple[Case, Task]] = deque()
    ending = dataset_json["file_ending"]
    segmentations = [None if previous is None else previous / (case.name + ending) for case in cases]
    calls = [
        (case, segmentation, plans, configuration, dataset_json, predictor.verbose_preprocessing)
        for case, segmentation in zip(cases, segmentations, strict=True)
    ]

    def collect(left: int) -> None:
        while len(exports) > left:
            case, task = exports.popleft()
            try:
                crew.writers.result(task)
            except CaseError as error:
                failed[case.name] = str(error)

    prepared = crew.readers.in_order(preprocess_case, calls)
    for number, (case, task) in enumerate(zip(cases, prepared, strict=True), start=1):
        try:
            data, properties = crew.readers.result(task)
            print(f"Predicting {case.name} ({number} of {len(cases)})", flush=True)
            logits = _logits(predictor, data)
        except CaseError as error:
            failed[case.name] = str(error)
            print(f"{case.name} cannot be predicted: {error}", flush=True)
            continue
        written = crew.writers.start(
            export_case, logits, properties, configuration, plans, dataset_json, out / case.name,
            options.probabilities, options.postprocessing,
        )  # fmt: skip
        exports.append((case, written))
        del data, logits
        collect(options.export + _WAITING if options.export else 0)
    collect(0)

    compute_gaussian.cache_clear()
    empty_cache(predictor.device)
    return failed


def _logits(predictor: MaskSAMPredictor, data: NDArray[np.float32]) -> NDArray[np.float16]:
    try:
        logits: NDArray[np.float16] = (
            predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()
        )
    except (CaseError, PredictError):
        raise
    except Exception as error:  # of any network
        raise CaseError(f"the network of {predictor.trainer_name} cannot predict it: {in_short(error)}") from error
    return logits


def export_case(
    logits: NDArray[np.float16],
    properties: dict[str, Any],
    configuration: Any,
    plans: Any,
    dataset_json: Mapping[str, Any],
    target: Path,
    probabilities: bool,
    postprocessing: Postprocessing | None,
) -> None:
    """Resample and write a prediction by nnU-Net's own function, whole or not at all.

    Args:
        logits: (K, x, y, z).
        properties: what preprocessing tells of the case.
        configuration: nnU-Net's ConfigurationManager.
        plans: its PlansManager.
        dataset_json: the model's.
        target: folder and name of the case.
        probabilities: whether to write them too; without post-processing, as in nnU-Net.
        postprocessing: done on the label map.

    Raises:
        PredictError: the disk is full or not writable.
    """
    ending, reader = dataset_json["file_ending"], plans.image_reader_writer_class()
    with draft(target, ending, reader, probabilities) as name:
        export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(name), probabilities)
        if postprocessing is not None:
            postprocessing.apply(name.with_name(name.name + ending), reader)
