"""From trained folds to a report: fairness checked, folds put together, scored, compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.history import History
from masksam_nnunet.inference.label_maps import Classes, LabelMapError
from masksam_nnunet.inference.scoring import Scores, default_tolerance_mm, read_label_map, score_folder
from masksam_nnunet.inference.versions import git_hash, versions

from .case_table import case_table, write_csv
from .checks import check_fairness, faulty_prediction, refuse_unfair
from .combine import Combined, combine
from .folds import read_fold_compute
from .names import joint_name, postprocessed_name, row_names
from .nnunet_scores import check_against_nnunet
from .report import write_benchmark_report
from .results import BenchmarkResults, Kind, Method, Row
from .statistics import aggregates, comparisons, policies
from .test_set import score_test_set

SCORES_FILE = "scores.csv"


def evaluate(
    dataset: str,
    configuration: str,
    methods: Sequence[Method],
    folds: Sequence[int],
    out: Path,
    *,
    ensembles: bool = True,
    accept_unfair: bool = False,
    device: str = "cuda",
    processes: int = 2,
    commands: Sequence[str] = (),
    patients: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Path:
    """Evaluate a finished grid and write its report.

    Args:
        dataset: its full name.
        configuration: nnU-Net's.
        methods: trained and validated in all ``folds``.
        folds: of the cross-validation.
        out: the benchmark's folder.
        ensembles: whether to ensemble pairs of methods; needs the probabilities of validation (``--npz``).
        accept_unfair: write the report in spite of severe findings, which then open it.
        device: for predicting labelled test cases, if there are any.
        processes: workers.
        commands: what was run to train; those of the evaluation are added.
        patients: patient by case; None where the case names are to tell.
        console: where progress is told.

    Returns:
        report.html.

    Raises:
        BenchmarkError: what is not fair, what lacks, what differs.
    """
    console = console or Console()
    raw, preprocessed, results = (Path(os.environ[f"nnUNet_{n}"]) / dataset for n in ("raw", "preprocessed", "results"))
    dataset_json = read_json(preprocessed / "dataset.json")
    splits = read_json(preprocessed / "splits_final.json")

    with console.status("checking that the comparison is fair"):
        findings = check_fairness(methods, folds, results, preprocessed, patients)
    severe = [finding.text for finding in findings if finding.severe]
    refuse_unfair(severe, accept_unfair, "this comparison is not fair")
    cases = {fold: tuple(sorted(splits[fold]["val"])) for fold in folds}
    fold_of = {case: fold for fold, names in cases.items() for case in names}
    truths, stamp_file = preprocessed / "gt_segmentations", out / "combined.json"
    fault = partial(faulty_prediction, methods, cases, results, truths, dataset_json)
    with (
        console.status("putting folds together (nnU-Net's find_best_configuration and post-processing)"),
        _naming_faults(fault),
    ):
        combined = combine(methods, dataset, folds, ensembles, processes, out / "logs" / "evaluation.log", stamp_file)

    try:
        tolerance = default_tolerance_mm(read_label_map(truths, case, dataset_json) for case in fold_of)
    except LabelMapError as error:
        raise BenchmarkError(f"the truth cannot be read: {error}") from error
    names = row_names(methods)
    compute = {m: tuple(read_fold_compute(results / m.key / f"fold_{fold}") for fold in folds) for m in methods}
    rows: list[Row] = []
    best = None
    for part in combined:
        name = joint_name([names[member] for member in part.members])
        best = name if part.best else best
        kinds: tuple[tuple[str, Path, Kind], ...] = (
            (name, part.folder, "method" if len(part.members) == 1 else "ensemble"),
            (postprocessed_name(name), part.postprocessed, "postprocessed"),
        )
        for row_name, folder, kind in kinds:
            with (
                console.status(f"scoring {row_name}"),
                _naming_faults(fault),
            ):
                scores = _score(folder, truths, dataset_json, sorted(fold_of), tolerance, processes, stamp_file)
            histories: Mapping[int, History] = {}
            if kind == "method":
                (method,) = part.members
                histories = {
                    f: History.read(results / method.key / f"fold_{f}" / "checkpoint_final.pth") for f in folds
                }
            taken = tuple(fold for member in part.members for fold in compute[member])
            rows.append(Row(row_name, kind, part.members, scores, fold_of, taken, histories, folder))

    with console.status("predicting and scoring the test set"):
        test_set, more = score_test_set(
            methods, raw, dataset_json, folds, ensembles, device, out / "test_set", processes, tolerance
        )
    classes = Classes.from_dataset_json(dataset_json)
    with console.status("statistics"):
        found = BenchmarkResults(
            dataset=dataset,
            dataset_json=dataset_json,
            configuration=configuration,
            folds=tuple(folds),
            cases=cases,
            rows=tuple(rows),
            aggregates=aggregates(rows, patients),
            comparisons=comparisons(rows, patients=patients),
            findings=findings,
            test_set=tuple(test_set),
            best=best,
            policies=policies(rows, classes.ignore_label is not None, patients)
            | _postprocessing(combined, names, classes),
            versions=versions(),
            git_hash=git_hash(),
            commands=(*commands, *more),
            images=raw / "imagesTr",
            truths=truths,
        )
    with console.status("writing the report"):
        try:
            write_csv(out / SCORES_FILE, case_table(rows))
        except OSError as error:
            raise BenchmarkError(f"{out} cannot be written: {error}; make room and run masksam report {out}") from error
        return write_benchmark_report(out, found)


@contextmanager
def _naming_faults(find: Callable[[], str | None]) -> Iterator[None]:
    """Errors name the file of a fold that they come from, if there is one: what was put together is but its copy."""
    try:
        yield
    except BenchmarkError as error:
        fault = find()
        if fault is None:
            raise
        raise BenchmarkError(fault) from error


def _score(
    folder: Path,
    truths: Path,
    dataset_json: Mapping[str, Any],
    cases: Sequence[str],
    tolerance: float,
    processes: int,
    stamp_file: Path,
) -> Scores:
    """Scores whose Dice is nnU-Net's own."""
    try:
        scores = score_folder(folder, truths, dataset_json, cases, tolerance, processes=processes)
    except LabelMapError as error:
        raise BenchmarkError(f"{folder}: {error}") from error
    try:
        check_against_nnunet(scores, folder / "summary.json", dataset_json)
    except BenchmarkError:
        stamp_file.unlink(missing_ok=True)  # the next run has nnU-Net put them together and score them again
        raise
    return scores


def _postprocessing(combined: Sequence[Combined], names: Mapping[Method, str], classes: Classes) -> dict[str, str]:
    """The policy, and what nnU-Net chose for each."""
    chosen = []
    for part in combined:
        kept = part.postprocessing(classes)
        name = joint_name([names[member] for member in part.members])
        chosen.append(f"{name}: {', then '.join(kept) if kept else 'nothing helped'}")
    text = (
        "Comparisons are made without post-processing, for all methods alike. The post-processed rows have nnU-Net's: "
        "largest components, kept where that raises the mean Dice of these same cases, so that they are optimistic. "
        "Only the largest component is kept of: "
    )
    return {"postprocessing": text + "; ".join(chosen) + "."}
