"""Cross-validation put together by nnU-Net's own functions: folds merged, pairs ensembled, the best one chosen, all
post-processed, and our Dice checked against nnU-Net's."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import load_summary_json
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string, get_ensemble_name

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.label_maps import Classes

from .definition import Benchmark
from .results import Method

_FAILURES = (
    *(RuntimeError, AssertionError, LookupError, OSError, ValueError, EOFError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),  # a probability file that was cut short
)


@dataclass(frozen=True)
class Combined:
    """Predictions for all validation cases of all folds, by one method or an ensemble of two."""

    members: tuple[Method, ...]
    folder: Path  # one label map for each case, nnU-Net's summary.json, and the folder of the post-processed ones
    best: bool = False  # whether nnU-Net's find_best_configuration chose it

    @property
    def postprocessed(self) -> Path:
        """nnU-Net's folder of the post-processed label maps."""
        return self.folder / "postprocessed"

    def postprocessing(self, classes: Classes) -> list[str]:
        """The classes of which nnU-Net keeps the largest component only, in its order; none where that did not help."""
        kept = read_json(self.folder / "postprocessing.json")["postprocessing_kwargs"]
        return list(dict.fromkeys(_named(one["labels_or_regions"], classes) for one in kept))


def _named(labels: int | Sequence[int], classes: Classes) -> str:
    """The class or region of these labels; nnU-Net also tries all of them as one."""
    wanted = set(_labels(labels))
    for name, values in classes.foreground.items():
        if wanted == set(values):
            return name
    if wanted == {value for values in classes.foreground.values() for value in values}:
        return "the whole foreground"
    return f"the labels {', '.join(map(str, sorted(wanted)))}"


def _labels(label: int | Sequence[int]) -> tuple[int, ...]:
    """A label or a region, as dataset.json and nnU-Net's summary write it."""
    return tuple(label) if isinstance(label, Sequence) else (int(label),)


def combine(benchmark: Benchmark, log: Path, stamp_file: Path) -> list[Combined]:
    """Combine the folds of each method, and of all pairs if wanted, each with nnU-Net's post-processing.

    Args:
        benchmark: all folds are trained and validated, with probabilities (``--npz``) if methods are ensembled.
        log: file for what nnU-Net prints.
        stamp_file: remembers what was combined; the work is repeated only if a prediction or a truth has changed.

    Raises:
        DataError: nnU-Net's functions fail.
    """
    results, folds = benchmark.results, tuple(benchmark.folds)
    truths = benchmark.preprocessed / "gt_segmentations"
    models = {method: results / method.key for method in benchmark.methods}
    merged = f"crossval_results_folds_{folds_tuple_to_string(folds)}"
    combined = [Combined((method,), model / merged) for method, model in models.items()]
    for a, b in combinations(models, 2) if benchmark.ensembles else ():
        name = get_ensemble_name(str(models[a]), str(models[b]), folds)
        combined.append(Combined((a, b), results / "ensembles" / name))

    folders = [truths, *(model / f"fold_{fold}" / "validation" for model in models.values() for fold in folds)]
    stamp = stamp_of([file for folder in folders for file in sorted(folder.iterdir())], benchmark.ensembles)
    remembered = read_stamped(stamp_file, stamp)
    if remembered is None or any(not (part.folder / "postprocessing.json").is_file() for part in combined):
        stamp_file.unlink(missing_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            try:
                remembered = {"stamp": stamp, "best": _run_nnunet(benchmark, combined, truths)}
            except _FAILURES as error:
                raise DataError(
                    f"nnU-Net could not put the cross-validation together: {type(error).__name__}: {error}; see {log}. "
                    "Remove a damaged file of a fold's validation, and run masksam benchmark again to validate that "
                    "fold; trained folds are kept"
                ) from error
        write_json(stamp_file, remembered)
    return [replace(part, best=str(part.folder) == remembered["best"]) for part in combined]


def _run_nnunet(benchmark: Benchmark, combined: Sequence[Combined], truths: Path) -> str | None:
    """Fill the folders; return the one that nnU-Net chooses.

    It chooses none where a class is in no case: its mean Dice is then NaN, and find_best_configuration fails after it
    has scored everything.
    """
    for part in combined:
        shutil.rmtree(part.folder, ignore_errors=True)  # nnU-Net leaves an ensemble's old files there
    models = [{"plans": m.plans, "configuration": m.configuration, "trainer": m.trainer} for m in benchmark.methods]
    processes, best = benchmark.processes, None
    try:
        found = find_best_configuration(
            benchmark.results.name,
            models,
            allow_ensembling=benchmark.ensembles,
            num_processes=processes,
            overwrite=True,
            folds=tuple(benchmark.folds),
        )
        best = str(Path(found["best_model_or_ensemble"]["postprocessing_file"]).parent)
    except IndexError:
        if any(not (part.folder / "summary.json").is_file() for part in combined):
            raise
    for folder in (part.folder for part in combined if str(part.folder) != best):  # that one is post-processed
        plans, description = str(folder / "plans.json"), str(folder / "dataset.json")
        determine_postprocessing(str(folder), str(truths), plans, description, processes, keep_postprocessed_files=True)
    return best


def stamp_of(files: Sequence[Path], *settings: object) -> str:
    """A text that changes with any of these files, by size and time of change, and with the settings."""
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr((settings, states)).encode()).hexdigest()


def read_stamped(file: Path, stamp: str) -> dict[str, Any] | None:
    """The content of a JSON file; None where it is missing, damaged or has another ``stamp``."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("stamp") == stamp else None


def check_against_nnunet(scores: pd.DataFrame, summary_json: Path, dataset_json: Mapping[str, Any]) -> None:
    """Check that our Dice is nnU-Net's to 1e-6, for each case and class and for the means; NaN equals NaN.

    Args:
        scores: of the folder that ``summary_json`` describes, as :func:`~.scoring.score_folder` returns them.
        summary_json: nnU-Net's.
        dataset_json: names the classes that nnU-Net numbers.

    Raises:
        DataError: the file is not readable, is about other cases or classes, or a value differs.
    """
    names = {values: name for name, values in Classes.from_dataset_json(dataset_json).foreground.items()}
    ending = str(dataset_json["file_ending"])
    try:
        summary = load_summary_json(str(summary_json))
        metrics = {
            Path(e["prediction_file"]).name.removesuffix(ending): e["metrics"] for e in summary["metric_per_case"]
        }
        metrics["mean over cases"] = summary["mean"]
        theirs = {
            (case, names[_labels(key)]): of["Dice"] for case, found in metrics.items() for key, of in found.items()
        }
        theirs["mean over cases", "all classes"] = summary["foreground_mean"]["Dice"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{summary_json} is missing or not nnU-Net's summary of this dataset ({error!r}); score the folder again "
            "with nnUNetv2_evaluate_folder"
        ) from error
    dice = scores[scores["metric"] == "dice"].set_index(["case", "class"])["value"]
    means = dice.groupby("class").mean()
    ours = {**dice, **{("mean over cases", name): value for name, value in means.items()}}
    ours["mean over cases", "all classes"] = means.mean(skipna=False)
    if others := sorted(f"{case}, {name}" for case, name in ours.keys() ^ theirs.keys()):
        raise DataError(
            f"{summary_json} and the scored files differ in cases or classes: {'; '.join(others[:5])}; remove files of "
            "other cases from that folder, and score it again with nnUNetv2_evaluate_folder"
        )
    differing = [
        f"{case}, {name}: {value:.6f} here, {theirs[case, name]:.6f} there"
        for (case, name), value in ours.items()
        if not np.isclose(value, theirs[case, name], rtol=0, atol=1e-6, equal_nan=True)
    ]
    if differing:
        raise DataError(
            f"Dice differs from nnU-Net's in {len(differing)} values of {summary_json}: {'; '.join(differing[:5])}; "
            "restore the files that have changed since, or score them again with nnUNetv2_evaluate_folder"
        )
