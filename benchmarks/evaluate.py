"""From trained folds to a report: fairness checked, folds combined by nnU-Net, scored, compared, drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from rich.console import Console

from masksam_nnunet.errors import DataError, MaskSAMError, in_short
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference import scoring
from masksam_nnunet.inference.explain.run import draw_preprocessed
from masksam_nnunet.inference.label_maps import Classes, read_label_map
from masksam_nnunet.inference.provenance import History, git_hash, versions
from masksam_nnunet.inference.report.html import Picture
from masksam_nnunet.plans.raw_data import read_raw_dataset

from . import statistics
from .checks import check_fairness, few_iterations, refuse_unfair
from .combine import combine
from .definition import Benchmark
from .folds import FINAL, read_fold_compute
from .plots import choose_cases
from .report import write_report
from .results import COLUMNS, BenchmarkResults, is_masksam, row_names
from .test_set import score_test_set


def evaluate(
    benchmark: Benchmark,
    out: Path,
    commands: Sequence[str] = (),
    patients: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Path:
    """Evaluate trained and validated folds and write their report; the path of report.html.

    Args:
        benchmark: what is compared; one fold is enough. Ensembles need the probabilities of validation (``--npz``).
        out: the benchmark's folder.
        commands: what was run to train; those of the evaluation are added.
        patients: patient by case; by default as the case names show.
        console: shows progress.

    Raises:
        DataError: the comparison is not fair, or files are missing, damaged or do not fit.
    """
    console = console or Console()
    methods, folds, results = benchmark.methods, benchmark.folds, benchmark.results
    raw = Path(os.environ["nnUNet_raw"]) / benchmark.dataset
    dataset_json = read_json(benchmark.preprocessed / "dataset.json")
    classes = Classes.from_dataset_json(dataset_json)
    truths, mark = benchmark.preprocessed / "gt_segmentations", out / "combined.json"
    splits = read_json(benchmark.preprocessed / "splits_final.json")
    cases = {fold: tuple(sorted(splits[fold]["val"])) for fold in folds}
    fold_of = {case: fold for fold, names in cases.items() for case in names}

    if dataset_json["file_ending"].lower() in Tiff3DIO.supported_file_endings:
        # nnU-Net copies true label maps without the .json beside a TIFF, which holds its spacing.
        for case, label in read_raw_dataset(raw, "-d", min_cases=1).labels.items():
            sizes, place = label.with_suffix(".json"), truths / f"{case}.json"
            try:
                if sizes.is_file() and not place.is_file():
                    write_json(place, read_json(sizes))
            except OSError as error:
                raise DataError(f"{place}, which holds a TIFF's spacing, cannot be written: copy {sizes}") from error
    with console.status("checking that the comparison is fair"):
        folders = {name: [results / m.key / f"fold_{f}" for f in folds] for m, name in row_names(methods).items()}
        histories = {
            name: {fold: History.read(folder / FINAL) for fold, folder in zip(folds, found, strict=True)}
            for name, found in folders.items()
        }
        compute = {
            name: tuple(map(read_fold_compute, found, histories[name].values())) for name, found in folders.items()
        }
        few = few_iterations(compute)
        findings = [*check_fairness(methods, compute, results, benchmark.preprocessed, patients), *few]
    for finding in few:
        console.print(f"note: {finding.text}", highlight=False, markup=False, soft_wrap=True)
    severe = [finding.text for finding in findings if finding.severe]
    refuse_unfair(severe, benchmark.accept_unfair, "this comparison is not fair")
    patient = statistics.patient_of(sorted(fold_of), patients)

    try:
        with console.status("combining folds with nnU-Net's functions"):
            rows, postprocessing, best = combine(benchmark, classes, out / "logs" / "evaluation.log", mark)
        tolerance = scoring.default_tolerance_mm(read_label_map(truths, case, dataset_json) for case in fold_of)
        tables = []
        for row in rows:
            with console.status(f"scoring {row.name}"):
                found = scoring.score_folder(
                    row.predictions, truths, dataset_json, sorted(fold_of), tolerance, benchmark.processes
                )
                tables.append(found.assign(method=row.name, kind=row.kind))
    except MaskSAMError:
        mark.unlink(missing_ok=True)  # the next run lets nnU-Net combine and score the folds again
        require_sound(benchmark, cases)
        raise
    scores = pd.concat(tables, ignore_index=True)
    scores = scores.assign(fold=scores["case"].map(fold_of), patient=scores["case"].map(patient))[list(COLUMNS)]

    with console.status("predicting and scoring the test set"):
        test_set, more = score_test_set(benchmark, raw, dataset_json, out / "test_set", tolerance)
    with console.status("computing statistics"):
        means = statistics.summarise(scores)
        comparisons = statistics.compare(scores, statistics.default_pairs(rows))
    complete = BenchmarkResults(
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
        compute=compute,
        histories=histories,
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
        return write_report(replace(complete, inside=_inside(complete, results, benchmark.preprocessed)), out)


def require_sound(benchmark: Benchmark, cases: Mapping[int, Sequence[str]]) -> None:
    """Raise a DataError for the first validated label map that is damaged or not on its truth's grid.

    It reads the label maps of all ``cases``, which are given by fold, to explain an error of nnU-Net's functions: they
    combine copies, and name no file.
    """
    truths, dataset_json = (
        benchmark.preprocessed / "gt_segmentations",
        read_json(benchmark.preprocessed / "dataset.json"),
    )
    for method, (fold, names) in product(benchmark.methods, cases.items()):
        validation = benchmark.results / method.key / f"fold_{fold}" / "validation"
        for case in names:
            try:
                scoring.read_pair(validation, truths, dataset_json, case)
            except MaskSAMError as error:
                file = validation / (case + dataset_json["file_ending"])
                remedy = f"If the truth is right, remove {file} and run masksam benchmark again"
                raise DataError(f"{error}. {remedy}") from error


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
