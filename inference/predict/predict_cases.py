"""Predict cases one after another with one model; a case that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import NDArray

from masksam_nnunet.errors import CaseError, MaskSAMError, in_short

from ..cases import Case, preprocess_case
from ..models import Model
from ..predictor import MaskSAMPredictor
from .output import Predictions
from .postprocessing import Postprocessing
from .workers import Workers

_WAITING = 2
"""Predictions that may wait for a free export process: they are large, and the network can be faster."""


@dataclass(frozen=True)
class PredictOptions:
    """How cases are predicted and written.

    Attributes:
        device: cuda, cpu or mps.
        step_size: distance of windows, in patches.
        mirroring: average predictions of mirrored windows too.
        on_device: keep results on the GPU where they fit.
        batch_size: windows and mirrors at once; None to choose it.
        verbose: of nnU-Net's predictor and preprocessor.
        progress: show progress bars.
        probabilities: write nnU-Net's ``CASE.npz`` and ``CASE.pkl`` too.
        resume: keep whole predictions of the same models.
        preprocessing_processes: that read and preprocess; 0 to do it in this process.
        export_processes: that resample and write; 0 to do it in this process.
        previous: folder of the previous stage's label maps, for cascades.
        parts: number of commands that share the cases.
        part: which of them this one is, from 0.
        postprocessing: applied to the label maps.
    """

    device: str = "cuda"
    step_size: float = 0.5
    mirroring: bool = True
    on_device: bool = True
    batch_size: int | None = None
    verbose: bool = False
    progress: bool = True
    probabilities: bool = False
    resume: bool = False
    preprocessing_processes: int = 3
    export_processes: int = 3
    previous: Path | None = None
    parts: int = 1
    part: int = 0
    postprocessing: Postprocessing | None = None

    def predictor(self, model: Model) -> MaskSAMPredictor:
        """Make a predictor and load the model into it."""
        made = MaskSAMPredictor(
            tile_step_size=self.step_size,
            use_mirroring=self.mirroring,
            perform_everything_on_device=self.on_device,
            device=torch.device(self.device),
            verbose=self.verbose,
            verbose_preprocessing=self.verbose,
            allow_tqdm=self.progress,
            batch_size=self.batch_size,
        )
        model.load(made)
        return made


class Pools(NamedTuple):
    """Processes that read and preprocess, and that resample and write; kept between models, they start slowly."""

    readers: Workers
    writers: Workers


def predict_cases(
    predictor: MaskSAMPredictor,
    cases: Sequence[Case],
    output: Predictions,
    pools: Pools,
    previous: Path | None = None,
) -> dict[str, str]:
    """Predict and write cases; ``previous`` is, for a cascade, the folder of the previous stage's label maps.

    Returns:
        Why cases have no prediction, by name.

    Raises:
        UsageError: the disk is full or not writable.
    """
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    settings = (plans, configuration, predictor.dataset_json)
    failed: dict[str, str] = {}

    def to_read() -> Iterator[tuple[str, tuple[Any, ...]]]:
        for case in cases:
            segmentation = None if previous is None else previous / (case.name + output.ending)
            yield case.name, (case, segmentation, *settings, predictor.verbose_preprocessing)

    def to_write() -> Iterator[tuple[str, tuple[Any, ...]]]:
        started = 0
        # Without enumerate, which would keep a reference to the last volume.
        for name, outcome in pools.readers.outcomes(preprocess_case, to_read()):
            started += 1
            print(f"Predicting {name} ({started} of {len(cases)})", flush=True)
            try:
                logits, properties = _predict(predictor, outcome)
            except CaseError as error:
                failed[name] = str(error)
                print(f"{name} cannot be predicted: {error}", flush=True)
                continue
            del outcome
            yield name, (output, name, logits, properties, *settings)
            del logits

    for name, outcome in pools.writers.outcomes(export_case, to_write(), _WAITING):
        if isinstance(outcome, CaseError):
            failed[name] = str(outcome)
    compute_gaussian.cache_clear()
    empty_cache(predictor.device)
    return failed


def _predict(predictor: MaskSAMPredictor, preprocessed: Any) -> tuple[NDArray[np.float16], dict[str, Any]]:
    """The logits (K, x, y, z) and the properties of an outcome of preprocessing."""
    if isinstance(preprocessed, CaseError):
        raise preprocessed
    data, properties = preprocessed
    try:
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy(), properties
    except MaskSAMError:
        raise
    except Exception as error:  # of any network
        raise CaseError(f"the network of {predictor.trainer_name} cannot predict it: {in_short(error)}") from error


def export_case(
    output: Predictions,
    case: str,
    logits: NDArray[np.float16],
    properties: dict[str, Any],
    plans: Any,
    configuration: Any,
    dataset_json: dict[str, Any],
) -> None:
    """Resample logits (K, x, y, z) and write the prediction by nnU-Net's own function, with nnU-Net's managers."""
    with output.draft(case) as name:
        export_prediction_from_logits(
            logits, properties, configuration, plans, dataset_json, str(name), output.probabilities
        )
