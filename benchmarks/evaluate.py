"""From trained folds to a report: fairness checked, folds combined by nnU-Net, scored, compared, drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from rich.console import Console

from masksam_nnunet.errors import DataError, MaskSAMError, in_short
from masksam_nnunet.files import read_json
from masksam_nnunet.inference import scoring
from masksam_nnunet.inference.explain.run import draw_preprocessed
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.inference.provenance import History, git_hash, versions
from masksam_nnunet.inference.report.html import Picture

from . import statistics
from .checks import check_fairness, faulty_prediction, refuse_unfair
from .combine import Combined, check_against_nnunet, combine
from .definition import Benchmark
from .folds import read_fold_compute
from .pictures import choose_cases
from .report import write_report
from .results import COLUMNS, BenchmarkResults, Kind, Method, Row, is_masksam, joint_name, row_names
from .test_set import score_test_set


def evaluate(
    benchmark: Benchmark,
    out: Path,
    commands: Sequence[str] = (),
    patients: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Path:
    """Evaluate trained and validated folds and write their report.

    Args:
        benchmark: what is compared; one fold is enough. Ensembles need the probabilities of validation (``--npz``).
        out: the benchmark's folder.
        commands: what was run to train; those of the evaluation are added.
        patients: patient by case; by default as the case names show.
        console: shows progress.

    Returns:
        report.html.

    Raises:
        DataError: the comparison is not fair, or files are missing, damaged or do not fit.
    """
    console = console or Console()
    methods, folds, processes = benchmark.methods, benchmark.folds, benchmark.processes
    preprocessed, results = benchmark.preprocessed, benchmark.results
    raw = Path(os.environ["nnUNet_raw"]) / benchmark.dataset
    dataset_json = read_json(preprocessed / "dataset.json")
    classes = Classes.from_dataset_json(dataset_json)
    truths, stamp_file = preprocessed / "gt_segmentations", out / "combined.json"
    splits = read_json(preprocessed / "splits_final.json")
    cases = {fold: tuple(sorted(splits[fold]["val"])) for fold in folds}
    names = sorted(name for fold in cases.values() for name in fold)
    patient = statistics.patient_of(names, patients)

    with console.status("checking that the comparison is fair"):
        findings = check_fairness(methods, folds, results, preprocessed, patients)
    severe = [finding.text for finding in findings if finding.severe]
    refuse_unfair(severe, benchmark.accept_unfair, "this comparison is not fair")

    with _naming_faults(partial(faulty_prediction, methods, cases, results, truths, dataset_json)):
        with console.status("combining folds with nnU-Net's find_best_configuration and post-processing"):
            combined = combine(benchmark, out / "logs" / "evaluation.log", stamp_file)
        rows, postprocessing, best = _rows(combined, row_names(methods), classes)
        tolerance = scoring.default_tolerance_mm(read_label_map(truths, case, dataset_json) for case in names)
        tables = []
        for row in rows:
            with console.status(f"scoring {row.name}"):
                found = scoring.score_folder(row.predictions, truths, dataset_json, names, tolerance, processes)
                try:
                    check_against_nnunet(found, row.predictions / "summary.json", dataset_json)
                except DataError:
                    stamp_file.unlink(missing_ok=True)  # the next run lets nnU-Net combine and score the folds again
                    raise
                tables.append(found.assign(method=row.name, kind=row.kind))
    scores = pd.concat(tables, ignore_index=True)
    fold_of = {case: fold for fold, names in cases.items() for case in names}
    scores = scores.assign(fold=scores["case"].map(fold_of), patient=scores["case"].map(patient))[list(COLUMNS)]

    with console.status("predicting and scoring the test set"):
        test_set, more = score_test_set(benchmark, raw, dataset_json, out / "test_set", tolerance)
    with console.status("computing statistics"):
        means = statistics.summarise(scores)
        comparisons = statistics.compare(scores, statistics.default_pairs(rows))
    trained = {row.name: results / row.members[0].key for row in rows if row.kind == "method"}
    found = BenchmarkResults(
        dataset=benchmark.dataset,
        dataset_json=dataset_json,
        configuration=benchmark.configuration,
        cases=cases,
        tolerance_mm=tolerance,
        rows=tuple(rows),
        scores=scores,
        means=means,
        comparisons=comparisons,
        test_set=test_set,
        compute={name: tuple(read_fold_compute(model / f"fold_{f}") for f in folds) for name, model in trained.items()},
        histories={
            name: {f: History.read(model / f"fold_{f}" / "checkpoint_final.pth") for f in folds}
            for name, model in trained.items()
        },
        findings=tuple(findings),
        best=best,
        policies={
            **scoring.policies(tolerance, classes.ignore_label is not None),
            **statistics.policies(patient, patients is not None),
            "postprocessing": postprocessing,
        },
        versions=versions(),
        git_hash=git_hash(),
        commands=(*commands, *more),
        images=raw / "imagesTr",
        truths=truths,
        notes=benchmark.notes,
    )
    with console.status("drawing and writing the report"):
        return write_report(replace(found, inside=_inside(found, results, preprocessed)), out)


@contextmanager
def _naming_faults(find: Callable[[], str | None]) -> Iterator[None]:
    """Let an error name the damaged file of a fold, if there is one: nnU-Net combines copies of such files."""
    try:
        yield
    except MaskSAMError as error:
        fault = find()
        if fault is None:
            raise
        raise DataError(fault) from error


def _rows(
    combined: Sequence[Combined], names: Mapping[Method, str], classes: Classes
) -> tuple[list[Row], str, str | None]:
    """The rows of the tables, the policy of post-processing, and the name of the row that nnU-Net chose."""
    rows, chosen, best = [], [], None
    for part in combined:
        name = joint_name([names[member] for member in part.members])
        kind: Kind = "method" if len(part.members) == 1 else "ensemble"
        rows.append(Row(name, kind, part.members, part.folder))
        rows.append(Row(f"{name}, post-processed", "postprocessed", part.members, part.postprocessed))
        chosen.append(f"{name}: {', then '.join(part.postprocessing(classes)) or 'nothing helped'}")
        best = name if part.best else best
    rows.sort(key=lambda row: ("method", "ensemble", "postprocessed").index(row.kind))
    text = (
        "Comparisons are made without post-processing. The post-processed rows have nnU-Net's: largest components, "
        "kept where that raises the mean Dice of these same cases, so that they are optimistic. Only the largest "
        f"component is kept of: {'; '.join(chosen)}."
    )
    return rows, text, best


def _inside(results: BenchmarkResults, models: Path, preprocessed: Path) -> tuple[Picture, ...]:
    """How the first MaskSAM prompts itself on its median case, or the better one of two."""
    method = results.focus.members[0]
    if not is_masksam(method):
        return ()
    chosen = list(choose_cases(results))
    case = chosen[min(1, len(chosen) - 1)]
    (fold,) = (fold for fold, names in results.cases.items() if case in names)
    try:
        return draw_preprocessed(models / method.key, fold, preprocessed, case)
    # A picture must not cost the report of days of training.
    except (MaskSAMError, OSError, RuntimeError, ValueError, AttributeError) as error:
        return (Picture(case, f"It could not be drawn: {in_short(error)}", b""),)
