"""What the container does: the model is loaded once, then one case after another is read, predicted and written.

All in this process: nnU-Net's workers need more shared memory than containers have.
"""

from __future__ import annotations

import gc
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor

from masksam_nnunet.errors import CaseError, in_short

from ..cases import preprocess_case
from ..predictor import MaskSAMPredictor
from .errors import SOME_CASES_FAILED, OptionError, OutputError
from .images import Geometry, in_terms_of, stage, write_label_map
from .interface import Job, Sockets, find_jobs
from .models import channel_names, find_model, load_model
from .options import Settings
from .time_limit import Deadline
from .timed import TimedPrediction


def run(settings: Settings) -> int:
    """Predict all cases of the input folder; one that fails costs itself only.

    Returns:
        0, or 1 if cases failed, which are listed on stderr.

    Raises:
        ContainerError: nothing can be predicted, or written.
    """
    log = Log(settings.time_limit)
    device = _device(settings.device)
    model = find_model(settings.models)
    sockets = Sockets.read(model, settings.channels, settings.output_slug)
    jobs = find_jobs(settings.input, settings.output, sockets, channel_names(model))
    _check_output(settings.output)
    log(f"{len(jobs)} case{'s' * (len(jobs) != 1)} in {settings.input}, model {model}, {_name(device)}")
    predictor = MaskSAMPredictor(
        device=device,
        use_mirroring=settings.mirroring,
        perform_everything_on_device=device.type == "cuda",
        allow_tqdm=False,
    )
    folds = load_model(predictor, model, settings.folds, settings.checkpoint)
    log(f"model loaded: folds {' '.join(folds)}")
    prediction = TimedPrediction(predictor, log.deadline, log)
    failed: dict[Path, str] = {}
    for number, job in enumerate(jobs):
        name = job.channels[0]
        log(f"case {number + 1} of {len(jobs)}: {' '.join(map(str, job.channels))}")
        folder = settings.scratch / "case"
        try:
            folder.mkdir()
            counts = _predict(job, folder, predictor, prediction, len(jobs) - number)
            log(f"written: {job.target}, voxels of each label {counts}")
        except CaseError as error:
            failed[name] = str(error)
        except OutputError:
            raise
        except Exception as error:  # of libraries, for this case: memory, the network
            failed[name] = in_short(error)
            print(traceback.format_exc(), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.collect()
            empty_cache(device)
        if name in failed:
            log(f"failed: {failed[name]}")
    log(f"{len(jobs) - len(failed)} of {len(jobs)} cases done")
    for name, reason in failed.items():
        print(f"error: {name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    return SOME_CASES_FAILED if failed else 0


class Log:
    """Prints lines with the seconds since the process's start; to stdout: the platform takes stderr for warnings."""

    def __init__(self, time_limit: float) -> None:
        self.deadline = Deadline(time_limit)

    def __call__(self, text: str) -> None:
        print(f"[{self.deadline.passed():7.1f} s] {text}", flush=True)


def _predict(
    job: Job, folder: Path, predictor: MaskSAMPredictor, prediction: TimedPrediction, cases_left: int
) -> dict[int, int]:
    """Predict and write one case; how many voxels each label has."""
    plans, configuration, dataset_json = (
        predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )  # fmt: skip
    file_ending, reader = dataset_json["file_ending"], plans.image_reader_writer_class()
    geometry = Geometry.of(job.channels[0])
    case = stage(job.channels, folder, file_ending, reader)
    try:
        with prediction.preparing():
            data, properties = preprocess_case(case, None, plans, configuration, dataset_json, False)
    except CaseError as error:
        raise CaseError(in_terms_of(error, case, job.channels)) from error
    logits = prediction(torch.from_numpy(data), cases_left)
    del data
    with prediction.writing(logits.shape):
        _export(logits, properties, folder / "labels", predictor)
        del logits
        return dict(write_label_map(folder / f"labels{file_ending}", job.target, geometry))


def _export(logits: Tensor, properties: dict[str, Any], target: Path, predictor: MaskSAMPredictor) -> None:
    try:
        export_prediction_from_logits(
            logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
            str(target),
        )  # fmt: skip
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent} ({in_short(error)}): give --scratch more room") from error


def _device(text: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"--device {text}: there is no such device here ({in_short(error)}); give auto or cpu"
        ) from error
    return device


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".masksam"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"--output {folder}: cannot write there ({error.strerror}); let the container's user write to it"
        ) from error
