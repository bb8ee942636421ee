"""What the container does: the model is loaded once, then one case after another is read, predicted and written.

All in this process: nnU-Net's workers need more shared memory than containers have.
"""

from __future__ import annotations

import gc
import re
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.helpers import empty_cache

from masksam_nnunet.errors import CaseError, MaskSAMError, ModelError, UsageError, WeightsError, in_short
from masksam_nnunet.files import read_json

from ..cases import channel_names, preprocess_case
from ..export.description import is_portable, read_description
from ..export.load import load_portable
from ..predictor import MaskSAMPredictor
from .images import read_header, stage, write_label_map
from .interface import ContainerOptions, Job, OutputError, find_jobs


def run(
    source: Path,
    output: Path,
    models: Sequence[Path],
    scratch: Path,
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    checkpoint: str = "checkpoint_final.pth",
    batch_size: int | None = None,
) -> int:
    """Predict all cases of the input folder; one that fails does not stop the others.

    Args:
        source: folder to read.
        output: folder to write.
        models: where a model is looked for; the first that exists counts.
        scratch: folder for temporary files, empty.
        options: override those of the model's container.json, by name.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        checkpoint: the file in each fold's folder.
        batch_size: windows and mirrors at once; chosen from device and patch if not given.

    Returns:
        0, or 1 if cases failed, which are listed on stderr.

    Raises:
        UsageError: an option or container.json.
        DataError: the input as a whole.
        ModelError: the model cannot be found or loaded.
        OutputError: the output cannot be written.
    """
    chosen = _device(device)
    model = find_model(models)
    container = ContainerOptions.read(model, options)
    jobs = find_jobs(source, output, container, _channels(model))
    _check_writable(output)
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
        folder = scratch / "case"
        try:
            folder.mkdir()
            counts = _predict(job, folder, predictor)
            _log(f"written: {job.target}, voxels of each label {counts}")
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
            empty_cache(chosen)
    _log(f"{len(jobs) - len(failed)} of {len(jobs)} cases done")
    for name, reason in failed.items():
        print(f"error: {name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _log(text: str) -> None:
    """To stdout: the platform takes stderr for warnings."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _predict(job: Job, folder: Path, predictor: MaskSAMPredictor) -> dict[int, int]:
    """Predict and write one case; how many voxels each label has."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    dataset_json = predictor.dataset_json
    file_ending = dataset_json["file_ending"]
    header = read_header(job.channels[0])
    case = stage(job.channels, folder, file_ending, plans.image_reader_writer_class())
    try:
        data, properties = preprocess_case(case, None, plans, configuration, dataset_json, False)
    except CaseError as error:
        text = str(error)
        for staged, file in zip(case.files, job.channels, strict=True):  # the user knows the given files only
            text = text.replace(str(staged), str(file)).replace(staged.name, str(file))
        raise CaseError(text) from error
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    del data
    labels = folder / "labels"
    try:
        export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(labels))
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({in_short(error)}): give --scratch more room") from error
    del logits
    return write_label_map(folder / f"labels{file_ending}", job.target, header)


def _device(text: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {text}: no such device here ({in_short(error)}); give auto or cpu") from error
    return device


def _check_writable(folder: Path) -> None:
    probe = folder / ".masksam"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--output {folder} is not writable ({error.strerror}) for the container's user") from error


# ---- the model -------------------------------------------------------------------------------------------------------


def find_model(places: Sequence[Path]) -> Path:
    """The model in the first of ``places`` that exists and is not empty: that folder, or the one model below it.

    Raises:
        ModelError: there is none, or several.
    """
    place = next((path for path in places if path.is_dir() and any(path.iterdir())), None)
    if place is None:
        named = " or ".join(map(str, places))
        raise ModelError(f"no model in {named}: mount one (--volume DIR:{places[0]}:ro), or name it with --model")
    found = sorted({file.parent for name in ("plans.json", "model.json") for file in place.rglob(name)})
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(place)) for path in found) or "none"
        raise ModelError(f"{place} must hold one model, portable or as in nnUNet_results, but has: {names} (--model)")
    return found[0]


def load_model(predictor: MaskSAMPredictor, folder: Path, folds: Sequence[str], checkpoint: str) -> list[str]:
    """Load ``folds``, or all that exist if none is named.

    Args:
        predictor: to predict with.
        folder: a model's, as :func:`find_model` finds it.
        folds: numbers or "all".
        checkpoint: the file in each fold's folder; portable models have none.

    Returns:
        The folds.

    Raises:
        ModelError: a file is missing, damaged or of another model; checkpoints are lean; or it is a cascade.
    """
    try:
        if is_portable(folder):
            load_portable(predictor, folder, folds or None)
            used = list(folds or read_description(folder).folds)
        else:
            used = _chosen(folder, folds, checkpoint)
            numbers = tuple(int(fold) if fold.isdecimal() else fold for fold in used)
            predictor.initialize_from_trained_model_folder(str(folder), numbers, checkpoint)
    except ModelError:
        raise
    except WeightsError as error:
        raise ModelError(f"{folder} has lean checkpoints; complete them with masksam export ({error})") from error
    except MaskSAMError as error:
        raise ModelError(str(error)) from error
    except Exception as error:  # of any trainer, and of damaged files
        raise ModelError(f"{folder} cannot be loaded ({in_short(error)}): copy or export it again") from error
    if stage := predictor.configuration_manager.previous_stage_name:
        raise ModelError(f"{folder} is a cascade, which needs predictions of {stage}: take another configuration")
    return used


def _channels(folder: Path) -> list[str]:
    file = folder / "dataset.json"
    try:
        return channel_names(read_json(file))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} does not name the model's channels ({in_short(error)}): copy it again") from error


def _chosen(folder: Path, folds: Sequence[str], checkpoint: str) -> list[str]:
    found = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
    there = [fold for fold in found if re.fullmatch(r"\d+|all", fold)]
    numbers = [fold for fold in there if fold != "all"]  # nnU-Net too prefers these
    missing = [fold for fold in folds if fold not in there]
    if missing or not there:
        named = f"of fold {', '.join(missing)}, only of {', '.join(there) or 'none'} (--folds)" if missing else ""
        raise ModelError(f"{folder} has no {checkpoint} {named}: name another file with --checkpoint")
    return list(folds) or numbers or there
