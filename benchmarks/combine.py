"""Cross-validation put together by nnU-Net's own functions: folds merged, pairs ensembled, the best one chosen, all
post-processed, and our Dice checked against nnU-Net's."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
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

from .results import Method

_FAILURES = (
    *(RuntimeError, AssertionError, LookupError, OSError, ValueError, EOFError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),  # a probability file that was cut short
)


@dataclass(frozen=True)
class Combined:
    """Predictions for all validation cases of all folds, by one method or an ensemble of two.

    Attributes:
        members: the methods.
        folder: one label map for each case, nnU-Net's summary.json, and the folder of the post-processed ones.
        best: whether nnU-Net's find_best_configuration chose it.
    """

    members: tuple[Method, ...]
    folder: Path
    best: bool = False

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


def combine(
    methods: Sequence[Method],
    results: Path,
    truths: Path,
    folds: Sequence[int],
    ensembles: bool,
    processes: int,
    log: Path,
    stamp_file: Path,
) -> list[Combined]:
    """Combine the folds of each method, and of all pairs if wanted, each with nnU-Net's post-processing.

    Args:
        methods: all trained and validated in ``folds``, with probabilities (``--npz``) if they are ensembled.
        results: the dataset's folder in nnUNet_results.
        truths: gt_segmentations in nnUNet_preprocessed.
        folds: of the cross-validation.
        ensembles: whether to ensemble pairs.
        processes: workers.
        log: file for what nnU-Net prints.
        stamp_file: remembers what was combined; the work is repeated only if a prediction or a truth has changed.

    Raises:
        DataError: nnU-Net's functions fail.
    """
    folds = tuple(folds)
    models = {method: results / method.key for method in methods}
    merged = f"crossval_results_folds_{folds_tuple_to_string(folds)}"
    combined = [Combined((method,), model / merged) for method, model in models.items()]
    for a, b in combinations(methods, 2) if ensembles else ():
        name = get_ensemble_name(str(models[a]), str(models[b]), folds)
        combined.append(Combined((a, b), results / "ensembles" / name))

    stamp = _stamp([truths, *(m / f"fold_{fold}" / "validation" for m in models.values() for fold in folds)], ensembles)
    remembered = read_or_empty(stamp_file)
    best = remembered.get("best")
    if remembered.get("stamp") != stamp or any(not (c.folder / "postprocessing.json").is_file() for c in combined):
        stamp_file.unlink(missing_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            try:
                best = _run_nnunet(results.name, combined, truths, ensembles, processes, folds)
            except _FAILURES as error:
                raise DataError(
                    f"nnU-Net could not put the cross-validation together: {type(error).__name__}: {error}; see {log}. "
                    "Remove a damaged file of a fold's validation, and run masksam benchmark again to validate that "
                    "fold; trained folds are kept"
                ) from error
        write_json(stamp_file, {"stamp": stamp, "best": best})
    return [replace(part, best=str(part.folder) == best) for part in combined]


def _run_nnunet(
    dataset: str,
    combined: Sequence[Combined],
    truths: Path,
    ensembles: bool,
    processes: int,
    folds: tuple[int, ...],
) -> str | None:
    """Fill the folders; return the one that nnU-Net chooses.

    It chooses none where a class is in no case: its mean Dice is then NaN, and find_best_configuration fails after it
    has scored everything.
    """
    for part in combined:
        shutil.rmtree(part.folder, ignore_errors=True)  # nnU-Net leaves an ensemble's old files there
    methods = [part.members[0] for part in combined if len(part.members) == 1]
    models = [{"plans": m.plans, "configuration": m.configuration, "trainer": m.trainer} for m in methods]
    best = None
    try:
        found = find_best_configuration(
            dataset, models, allow_ensembling=ensembles, num_processes=processes, overwrite=True, folds=folds
        )
        best = str(Path(found["best_model_or_ensemble"]["postprocessing_file"]).parent)
    except IndexError:
        if any(not (part.folder / "summary.json").is_file() for part in combined):
            raise
    for part in combined:
        if str(part.folder) != best:  # nnU-Net has post-processed its choice
            determine_postprocessing(
                str(part.folder),
                str(truths),
                str(part.folder / "plans.json"),
                str(part.folder / "dataset.json"),
                processes,
                keep_postprocessed_files=True,
            )
    return best


def read_or_empty(file: Path) -> Mapping[str, Any]:
    """The content of a JSON file that remembers what was done; empty where it is missing or damaged."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(folders: Iterable[Path], ensembles: bool) -> str:
    """Changes with every file of these folders."""
    digest = hashlib.sha256(f"{ensembles}".encode())
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.is_file():
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


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
        described = {
            Path(e["prediction_file"]).name.removesuffix(ending): e["metrics"] for e in summary["metric_per_case"]
        }
        described["mean over cases"] = summary["mean"]
        theirs = {
            (case, names[_labels(label)]): scored["Dice"]
            for case, metrics in described.items()
            for label, scored in metrics.items()
        }
        theirs["mean over cases", "all classes"] = summary["foreground_mean"]["Dice"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{summary_json} is missing or not nnU-Net's summary of this dataset ({error!r}); score the folder again "
            "with nnUNetv2_evaluate_folder"
        ) from error
    dice = scores[scores["metric"] == "dice"]
    means = dice.groupby("class")["value"].mean()
    ours = dict(zip(zip(dice["case"], dice["class"], strict=True), dice["value"], strict=True))
    ours |= {("mean over cases", name): value for name, value in means.items()}
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
