"""Cross-validation put together by nnU-Net's own functions: folds merged, pairs ensembled, the best chosen, all
post-processed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TextIO

from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string, get_ensemble_name

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.label_maps import Classes

from .results import Method

_DAMAGED = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
POSTPROCESSED = "postprocessed"
"""nnU-Net's name of the folder inside a folder of predictions."""


@dataclass(frozen=True)
class Combined:
    """Predictions for all validation cases of all folds, by one method or an ensemble of two."""

    members: tuple[Method, ...]
    folder: Path
    """One label map a case, nnU-Net's summary.json, and the folder of the post-processed ones."""
    best: bool = False
    """What nnU-Net's find_best_configuration chose."""

    @property
    def postprocessed(self) -> Path:
        return self.folder / POSTPROCESSED

    def postprocessing(self, classes: Classes) -> list[str]:
        """Of what nnU-Net keeps the largest component only, in its order; nothing where that did not help."""
        kept = read_json(self.folder / "postprocessing.json")["postprocessing_kwargs"]
        return list(dict.fromkeys(_named(one["labels_or_regions"], classes) for one in kept))


def _named(labels: int | Sequence[int], classes: Classes) -> str:
    """The class or region of these labels; nnU-Net also takes all of them for one."""
    wanted = set(labels) if isinstance(labels, Sequence) else {labels}
    for name, values in classes.foreground.items():
        if wanted == set(values):
            return name
    if wanted == {value for values in classes.foreground.values() for value in values}:
        return "the whole foreground"
    return f"the labels {', '.join(map(str, sorted(wanted)))}"


def combine(
    methods: Sequence[Method],
    dataset: str,
    folds: Sequence[int],
    ensembles: bool,
    processes: int,
    log: Path,
    stamp_file: Path,
) -> list[Combined]:
    """Methods, then, if wanted, all pairs of them; each with nnU-Net's post-processing determined on the same cases.

    Done again only if a prediction changed since: what it took from is remembered in ``stamp_file``.

    Args:
        methods: all trained and validated in ``folds``; with probabilities (``--npz``) if ensembled.
        dataset: its full name.
        folds: of the cross-validation.
        ensembles: whether to ensemble pairs.
        processes: workers.
        log: what nnU-Net prints goes there.
        stamp_file: see above.

    Raises:
        BenchmarkError: what nnU-Net refuses.
    """
    results, ground_truth = (Path(os.environ[f"nnUNet_{name}"]) / dataset for name in ("results", "preprocessed"))
    folds = tuple(folds)
    models = {method: results / method.key for method in methods}
    merged = f"crossval_results_folds_{folds_tuple_to_string(folds)}"
    combined = [Combined((method,), model / merged) for method, model in models.items()]
    if ensembles:
        for a, b in combinations(methods, 2):
            name = get_ensemble_name(str(models[a]), str(models[b]), folds)
            combined.append(Combined((a, b), results / "ensembles" / name))

    stamp = _stamp(models.values(), folds, ensembles, ground_truth / "gt_segmentations")
    remembered = _remembered(stamp_file)
    whole = all((part.folder / "postprocessing.json").is_file() for part in combined)
    if remembered.get("stamp") == stamp and whole:
        return _marked(combined, remembered.get("best"))

    with _in_words(log), _opened(log) as stream, contextlib.redirect_stdout(stream):
        stamp_file.unlink(missing_ok=True)
        for part in combined:
            shutil.rmtree(part.folder, ignore_errors=True)  # nnU-Net leaves an ensemble's old files there
        best = _find_best(dataset, methods, combined, ensembles, processes, folds)
        for part in combined:
            if str(part.folder) != best:  # which has been done
                determine_postprocessing(
                    str(part.folder),
                    str(ground_truth / "gt_segmentations"),
                    str(part.folder / "plans.json"),
                    str(part.folder / "dataset.json"),
                    processes,
                    keep_postprocessed_files=True,
                )
        write_json(stamp_file, {"stamp": stamp, "best": best})
    return _marked(combined, best)


def _remembered(stamp_file: Path) -> Mapping[str, str | None]:
    """What was put together last; nothing where that cannot be told: it is then done again."""
    try:
        content = read_json(stamp_file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_best(
    dataset: str,
    methods: Sequence[Method],
    combined: Sequence[Combined],
    ensembles: bool,
    processes: int,
    folds: tuple[int, ...],
) -> str | None:
    """The folder that nnU-Net chooses. It has none where a class is in no case: its mean Dice is then NaN."""
    models = [{"plans": m.plans, "configuration": m.configuration, "trainer": m.trainer} for m in methods]
    try:
        found = find_best_configuration(
            dataset, models, allow_ensembling=ensembles, num_processes=processes, overwrite=True, folds=folds
        )
    except IndexError:
        if any(not (part.folder / "summary.json").is_file() for part in combined):
            raise
        return None
    return str(Path(found["best_model_or_ensemble"]["postprocessing_file"]).parent)


def _marked(combined: Sequence[Combined], best: str | None) -> list[Combined]:
    return [Combined(part.members, part.folder, str(part.folder) == best) for part in combined]


def _stamp(models: Iterable[Path], folds: Sequence[int], ensembles: bool, truths: Path) -> str:
    """Changes with every prediction and every truth."""
    digest = hashlib.sha256(f"{ensembles}".encode())
    for folder in (truths, *(model / f"fold_{fold}" / "validation" for model in models for fold in folds)):
        for file in sorted(folder.iterdir()):
            if file.is_file():
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(log: Path) -> Iterator[TextIO]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        yield stream


@contextlib.contextmanager
def _in_words(log: Path) -> Iterator[None]:
    try:
        yield
    # Among them what a probability file that was cut short raises in nnU-Net's workers.
    except (RuntimeError, AssertionError, LookupError, OSError, ValueError, EOFError, *_DAMAGED) as error:
        raise BenchmarkError(
            f"nnU-Net could not put the cross-validation together: {type(error).__name__}: {error}. What it printed is "
            f"in {log}. If a file of a fold's validation is damaged, remove it and run masksam benchmark again, which "
            "makes it anew; trained folds are kept."
        ) from error
