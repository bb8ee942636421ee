"""What the container does: the model is loaded once, then one case after another is read, predicted and written.

All in this process: nnU-Net's workers need more shared memory than containers have.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.helpers import empty_cache

from masksam_nnunet.errors import CaseError, ModelError, in_short
from masksam_nnunet.files import read_json
from masksam_nnunet.gpu import usable_device

from ..cases import channel_names, preprocess_case
from ..export.description import is_portable
from ..export.load import PortableModel
from ..models import parse_folds
from ..predictor import MaskSAMPredictor
from .images import read_header, stage, write_label_map
from .interface import ContainerOptions, Job, OutputError, find_jobs


def run(
    source: Path,
    output: Path,
    models: Sequence[Path],
    scratch: Path,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    checkpoint: str = "checkpoint_final.pth",
    batch_size: int | None = None,
) -> int:
    """Predict all cases of the input folder; return 0, or 1 if cases failed, which are listed on stderr.

    The arguments are those of the command in ``__main__``; ``models`` are the places to look for a model, ``scratch``
    is empty, and ``options`` that are not None override those in the model's container.json.

    Raises:
        MaskSAMError: UsageError for options, DataError for the input as a whole, ModelError, or OutputError.
    """
    chosen = usable_device(device)
    model = find_model(models)
    container = ContainerOptions.read(model, options)
    try:
        channels = channel_names(read_json(model / "dataset.json"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{model / 'dataset.json'} names no channels ({in_short(error)}): copy it again") from error
    jobs = find_jobs(source, output, container, channels)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise OutputError(f"--output {output} is not writable ({error.strerror}) for the container's user") from error
    _log(f"{len(jobs)} cases in {source}, model {model}, {chosen}")
    predictor = MaskSAMPredictor(
        tile_step_size=container.step_size,
        use_mirroring=container.mirroring,
        perform_everything_on_device=chosen.type == "cuda",
        device=chosen,
        allow_tqdm=False,
        batch_size=batch_size,
    )
    folds = load_model(predictor, model, container.folds, checkpoint)
    _log(f"model loaded: folds {' '.join(folds)}")
    failed: dict[Path, str] = {}
    for number, job in enumerate(jobs, 1):
        name = job.channels[0]
        _log(f"case {number} of {len(jobs)}: {' '.join(map(str, job.channels))}")
        try:
            with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
                counts = _predict(job, Path(folder), predictor)
            _log(f"written: {job.target}, voxels of each label {counts}")
        except OutputError:
            raise
        except CaseError as error:
            failed[name] = str(error)
        except Exception as error:  # of libraries, for this case: memory, the network
            failed[name] = in_short(error)
            print(traceback.format_exc(), flush=True)
        gc.collect()
        empty_cache(chosen)
    _log(f"{len(jobs) - len(failed)} of {len(jobs)} cases done")
    for name, reason in failed.items():
        print(f"error: {name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _log(text: str) -> None:
    """To stdout: the platform takes stderr for warnings."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _predict(job: Job, folder: Path, predictor: MaskSAMPredictor) -> dict[int, int]:
    """Predict and write one case; the number of voxels of each label."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    dataset_json = predictor.dataset_json
    file_ending = dataset_json["file_ending"]
    header = read_header(job.channels[0])
    case = stage(job.channels, folder, file_ending, plans.image_reader_writer_class())
    data, properties = preprocess_case(case, None, plans, configuration, dataset_json, False)
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    del data
    labels = folder / "labels"
    try:
        export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(labels))
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({in_short(error)}): give --scratch more room") from error
    del logits
    return write_label_map(folder / f"labels{file_ending}", job.target, header)


def find_model(places: Sequence[Path]) -> Path:
    """The one model in the first of ``places`` that is not empty, or below it; raise ModelError if there is none.

    nnU-Net copies a model's plans into its crossval_results folders, so that only the outermost count.
    """
    try:
        place = next((path for path in places if path.is_dir() and any(path.iterdir())), None)
    except OSError as error:
        raise ModelError(f"a model's folder cannot be read ({error}): give all users the right to read it") from error
    if place is None:
        raise ModelError(f"no model in {' or '.join(map(str, places))}: mount one, or name it with --model")
    with_plans = {file.parent for name in ("plans.json", "model.json") for file in place.rglob(name)}
    found = sorted(folder for folder in with_plans if with_plans.isdisjoint(folder.parents))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(place)) for path in found) or "none"
        raise ModelError(f"{place} must hold one model, portable or as in nnUNet_results, but has: {names} (--model)")
    return found[0]


def load_model(predictor: MaskSAMPredictor, folder: Path, folds: Sequence[str], checkpoint: str) -> list[str]:
    """Load ``folds``, or all that exist if none is named, of a portable model or from ``checkpoint``; return them.

    Raises:
        ModelError: a file is missing, damaged or of another model; checkpoints are lean; or it is a cascade.
    """
    used = parse_folds(folds)
    try:
        if is_portable(folder):
            model = PortableModel(folder, used or None)
            model.load(predictor)
            used = list(model.folds)
        else:  # nnU-Net too prefers numbers to "all"
            used = used or predictor.auto_detect_available_folds(str(folder), checkpoint) or ["all"]
            predictor.initialize_from_trained_model_folder(str(folder), tuple(used), checkpoint)
    except ModelError:
        raise
    except Exception as error:  # of any trainer, damaged files, and lean checkpoints without SAM's file
        raise ModelError(f"{folder} cannot be loaded ({in_short(error)}): complete it with masksam export") from error
    if stage := predictor.configuration_manager.previous_stage_name:
        raise ModelError(f"{folder} is a cascade, which needs predictions of {stage}: take another configuration")
    return [str(fold) for fold in used]
