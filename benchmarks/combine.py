"""Predictions of all folds together by nnU-Net's own functions: folds merged, pairs ensembled, the best chosen, all
post-processed."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string, get_ensemble_name

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.label_maps import Classes

from .definition import Benchmark
from .results import Row, row_names


def combine(benchmark: Benchmark, classes: Classes, log: Path, mark: Path) -> tuple[list[Row], str, str | None]:
    """Combine the folds of each method, and of all pairs if wanted, each with nnU-Net's post-processing if wanted.

    Args:
        benchmark: all folds are trained and validated, with probabilities (``--npz``) if methods are ensembled.
        classes: of the dataset.
        log: file for what nnU-Net prints.
        mark: remembers what was combined; the work is repeated only if a prediction or a truth has changed.

    Returns:
        The rows of the tables, what post-processing does, and the name of the row that nnU-Net chose, if it chose one.

    Raises:
        DataError: nnU-Net's functions fail.
    """
    results, folds, names = benchmark.results, tuple(benchmark.folds), row_names(benchmark.methods)
    truths = benchmark.preprocessed / "gt_segmentations"
    merged = f"crossval_results_folds_{folds_tuple_to_string(folds)}"
    rows = [Row(name, "method", (method,), results / method.key / merged) for method, name in names.items()]
    for a, b in combinations(names, 2) if benchmark.ensembles and benchmark.postprocessing else ():
        folder = results / "ensembles" / get_ensemble_name(str(results / a.key), str(results / b.key), folds)
        rows.append(Row(f"{names[a]} + {names[b]}", "ensemble", (a, b), folder))
    last = "postprocessing.json" if benchmark.postprocessing else "summary.json"
    if any(not (row.predictions / last).is_file() for row in rows):
        mark.unlink(missing_ok=True)

    def work() -> str | None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            try:
                return _run_nnunet(benchmark, [row.predictions for row in rows], truths)
            except Exception as error:  # of many kinds, also for a file that was cut short
                raise DataError(
                    f"nnU-Net could not put the cross-validation together: {type(error).__name__}: {error}; see {log}. "
                    "Remove a damaged file of a fold's validation, and run masksam benchmark again to validate that "
                    "fold; trained folds are kept"
                ) from error

    folders = [truths, *(results / method.key / f"fold_{fold}" / "validation" for method in names for fold in folds)]
    wanted = benchmark.ensembles, benchmark.postprocessing
    chosen = once(mark, [file for folder in folders for file in sorted(folder.iterdir())], wanted, work)
    if not benchmark.postprocessing:
        return rows, "nnU-Net's post-processing is not applied.", None
    best = next((row.name for row in rows if str(row.predictions) == chosen), None)
    kept = "; ".join(f"{row.name}: {', then '.join(kept_components(row.predictions, classes))}" for row in rows)
    rows += [
        Row(f"{row.name}, post-processed", "postprocessed", row.members, row.predictions / "postprocessed")
        for row in rows
    ]
    text = (
        "Comparisons are made without post-processing. The post-processed rows have nnU-Net's: largest components, "
        "kept where that raises the mean Dice of these same cases, so that they are optimistic. Only the largest "
        f"component is kept of: {kept}."
    )
    return rows, text, best


def _run_nnunet(benchmark: Benchmark, folders: Sequence[Path], truths: Path) -> str | None:
    """Fill the folders; return the one that nnU-Net chooses.

    It chooses none where a class is in no case: its mean Dice is then NaN, and find_best_configuration fails after it
    has scored everything.
    """
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # nnU-Net leaves an ensemble's old files there
    models = [{"plans": m.plans, "configuration": m.configuration, "trainer": m.trainer} for m in benchmark.methods]
    processes, best = benchmark.processes, None
    if not benchmark.postprocessing:
        for method, folder in zip(benchmark.methods, folders, strict=True):
            accumulate_cv_results(str(benchmark.results / method.key), str(folder), benchmark.folds, processes)
        return None
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
        if any(not (folder / "summary.json").is_file() for folder in folders):
            raise
    for folder in (folder for folder in folders if str(folder) != best):  # that one is post-processed
        plans, description = str(folder / "plans.json"), str(folder / "dataset.json")
        determine_postprocessing(str(folder), str(truths), plans, description, processes, keep_postprocessed_files=True)
    return best


def kept_components(folder: Path, classes: Classes) -> list[str]:
    """The classes of which nnU-Net keeps the largest component only, in its order; it also tries all of them as one."""
    names = {frozenset(values): name for name, values in classes.foreground.items()}
    names.setdefault(frozenset().union(*names), "the whole foreground")
    found = []
    for one in read_json(folder / "postprocessing.json")["postprocessing_kwargs"]:
        given = one["labels_or_regions"]
        labels = frozenset(given if isinstance(given, list) else [given])
        found.append(names.get(labels, f"the labels {', '.join(map(str, sorted(labels)))}"))
    return list(dict.fromkeys(found)) or ["nothing helped"]


def once(mark: Path, sources: Sequence[Path], settings: object, work: Callable[[], Any]) -> Any:
    """The result of ``work``, which is done unless ``mark`` holds it for the same settings and sources.

    Sources are compared by size and time of change.
    """
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources if file.is_file()]
    stamp = hashlib.sha256(repr((settings, states)).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        known = read_json(mark)
        if known["stamp"] == stamp:
            return known["result"]
    mark.unlink(missing_ok=True)
    result = work()
    write_json(mark, {"stamp": stamp, "result": result})
    return result
