"""Whether methods were trained on the same terms: inputs, time, machine, software, starting weights."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import RANDOM_INIT
from masksam_nnunet.errors import BenchmarkError, CheckpointError
from masksam_nnunet.inference.methods import has_budget
from masksam_nnunet.plans.architecture import read_config

from .fairness_models import model_configuration, side_by_side
from .fold_record import FoldRecord, read_fold_compute, sha256_of
from .fold_state import training_logs
from .names import row_names
from .results import Finding, FoldCompute, Method

TIME_TOLERANCE = 1.1
"""Training times that differ by more than this factor are told."""


@dataclass(frozen=True, eq=False)
class _Fold:
    """One trained fold of one method."""

    method: Method
    name: str
    number: int
    folder: Path
    record: FoldRecord | None
    compute: FoldCompute | None
    """None where the checkpoint cannot be read."""


def check_training(methods: Sequence[Method], folds: Sequence[int], results: Path, preprocessed: Path) -> list[Finding]:
    """Compare what the trained folds recorded and logged.

    Args:
        methods: to be compared.
        folds: to be compared, all trained.
        results: the dataset's folder in nnUNet_results.
        preprocessed: the dataset's folder in nnUNet_preprocessed.

    Raises:
        BenchmarkError: a record or the plans are not readable.
    """
    names = row_names(methods)
    trained, findings = [], []
    for method in methods:
        for number in folds:
            folder = results / method.key / f"fold_{number}"
            record = FoldRecord.read(folder)
            compute, reason = _compute(folder)
            trained.append(_Fold(method, names[method], number, folder, record, compute))
            if reason is not None:
                findings.append(
                    Finding(True, f"The checkpoint of {names[method]}, fold {number}, is damaged: {reason}.")
                )
    return [
        *findings,
        *_inputs(trained, preprocessed),
        *_times(trained),
        *_machines(trained),
        *_software(trained),
        *_starts(methods, trained, results),
    ]


def _compute(folder: Path) -> tuple[FoldCompute | None, str | None]:
    """What the training took, or why that cannot be said."""
    try:
        return read_fold_compute(folder), None
    except CheckpointError as error:
        if not zipfile.is_zipfile(folder / "checkpoint_final.pth"):
            return None, None  # told with the folds
        return None, str(error)


def _inputs(trained: Sequence[_Fold], preprocessed: Path) -> list[Finding]:
    """Splits, dataset.json and plans as they were when training began."""
    findings = []
    known = [
        (fold, fold.record.inputs) for fold in trained if fold.record is not None and fold.record.inputs is not None
    ]
    recorded = {(fold.method, fold.number) for fold, _ in known}
    unknown = [fold for fold in trained if (fold.method, fold.number) not in recorded]
    if unknown:
        findings.append(
            Finding(
                False,
                f"Trained outside this benchmark: {_which(unknown)}; with which splits, plans and dataset.json was not "
                "recorded, and is judged by the validation cases and by the copies in the model's folder only.",
            )
        )
    for name, key in (("splits_final.json", "splits_sha256"), ("dataset.json", "dataset_sha256")):
        now = sha256_of(preprocessed / name)
        changed = [fold for fold, inputs in known if getattr(inputs, key) != now]
        if changed:
            findings.append(
                Finding(
                    True,
                    f"{name} in nnUNet_preprocessed has changed since these folds were trained: {_which(changed)}.",
                )
            )
    for method in dict.fromkeys(fold.method for fold in trained):
        hashes = {fold.number: inputs.plans_sha256 for fold, inputs in known if fold.method == method}
        name = next(fold.name for fold in trained if fold.method == method)
        file = preprocessed / f"{method.plans}.json"
        if len(set(hashes.values())) > 1:
            values = {f"fold {number}": digest[:8] for number, digest in hashes.items()}
            findings.append(
                Finding(
                    True,
                    f"The folds of {name} were trained with different plans (by the beginning of their SHA-256; "
                    f"{side_by_side(values)}).",
                )
            )
        elif hashes and (not file.is_file() or sha256_of(file) not in hashes.values()):
            findings.append(
                Finding(
                    False,
                    f"{file.name} in nnUNet_preprocessed is not the file any more that {name} was trained with; the "
                    "model keeps its own copy.",
                )
            )
    return findings


def _times(trained: Sequence[_Fold]) -> list[Finding]:
    findings = []
    seconds = _by_method(trained, "seconds")
    totals = {name: sum(values) for name, values in seconds.items()}
    if totals and max(totals.values()) > TIME_TOLERANCE * min(totals.values()):
        findings.append(
            Finding(
                False,
                "The methods were trained for different times, over all folds: "
                + "; ".join(f"{name}: {_duration(total)}" for name, total in totals.items())
                + ".",
            )
        )
    budgets = {fold.name for fold in trained if has_budget(fold.method)}
    within = {name: values for name, values in seconds.items() if name in budgets}
    flat = [value for values in within.values() for value in values]
    if len(within) > 1 and max(flat) > TIME_TOLERANCE * min(flat):
        ranges = (f"{name}: {_duration(min(v))} to {_duration(max(v))}" for name, v in within.items())
        findings.append(
            Finding(
                True,
                "Methods that are trained for a given time were not given the same: seconds of a fold differ by more "
                f"than {TIME_TOLERANCE - 1:.0%} ({'; '.join(ranges)}).",
            )
        )
    epochs, iterations = _by_method(trained, "epochs"), _by_method(trained, "iterations")
    if epochs:
        lines = [
            f"{name}: {_span(values)} epochs"
            + (f", {_span(iterations[name])} iterations" if name in iterations else ", iterations not recorded")
            for name, values in epochs.items()
        ]
        findings.append(Finding(False, f"Length of the training of a fold: {'; '.join(lines)}."))
    return findings


def _machines(trained: Sequence[_Fold]) -> list[Finding]:
    devices = {fold: fold.compute.device for fold in trained if fold.compute is not None}
    if len(set(devices.values())) < 2:
        return []
    return [
        Finding(False, f"Folds were trained on different devices, so that times do not compare: {_groups(devices)}.")
    ]


def _software(trained: Sequence[_Fold]) -> list[Finding]:
    found = []
    recorded = [(fold, fold.record) for fold in trained if fold.record is not None]
    software = [(fold, record.all_versions()) for fold, record in recorded]
    packages = dict.fromkeys(package for _, versions in software for package in versions)
    for package in packages:
        # What an earlier version of this program did not record is no difference.
        values = {fold: versions[package] for fold, versions in software if versions.get(package)}
        if len(set(values.values())) > 1:
            found.append(Finding(False, f"Folds were trained with different versions of {package}: {_groups(values)}."))
    commits = {fold: commit for fold, record in recorded if (commit := record.all_commits()) is not None}
    if len(set(commits.values())) > 1:
        found.append(Finding(False, f"Folds were trained with different commits of this package: {_groups(commits)}."))
    return found


def _starts(methods: Sequence[Method], trained: Sequence[_Fold], results: Path) -> list[Finding]:
    """What MaskSAM's encoders start from."""
    findings = []
    for method in methods:
        folds = [fold for fold in trained if fold.method == method]
        try:
            config = read_config(model_configuration(method, results))
        except ConfigError as error:
            raise BenchmarkError(f"{results / method.key / 'plans.json'}: {error}") from error
        if config is None:
            continue
        name = folds[0].name
        if not config.needs_sam:
            findings.append(
                Finding(
                    False,
                    f"{name} has {config.backbone}, {config.encoder.description}: it says nothing about MaskSAM with "
                    "SAM's weights.",
                )
            )
            continue
        logs = {fold: _log(fold.folder) for fold in folds}
        random = [fold for fold, log in logs.items() if f"{RANDOM_INIT} is set" in log]
        unknown = [fold for fold, log in logs.items() if not log]
        if random:
            findings.append(
                Finding(
                    True,
                    f"SAM's part of the network held random, frozen weights ({RANDOM_INIT}) in {_which(random)}: the "
                    "results say nothing about MaskSAM.",
                )
            )
        if unknown:
            findings.append(
                Finding(
                    False,
                    f"Whether SAM's weights were loaded is not known for {_which(unknown)}: nnU-Net's training log is "
                    "not there.",
                )
            )
        if len(random) + len(unknown) < len(folds):
            findings.append(
                Finding(
                    False,
                    f"{name} starts from SAM's {config.sam} weights, which were trained on other images; methods "
                    "without SAM start from random weights.",
                )
            )
    return findings


def _log(folder: Path) -> str:
    """nnU-Net's training logs, one after the other."""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in training_logs(folder))


def _by_method(trained: Sequence[_Fold], name: str) -> dict[str, list[float]]:
    """A figure of all folds of each method that has it for all its folds."""
    values: dict[str, list[float | None]] = {}
    for fold in trained:
        values.setdefault(fold.name, []).append(None if fold.compute is None else getattr(fold.compute, name))
    return {who: [v for v in figures if v is not None] for who, figures in values.items() if None not in figures}


def _groups(values: Mapping[_Fold, str]) -> str:
    """Which folds have which value."""
    return "; ".join(
        f"{value} ({_which(fold for fold, other in values.items() if other == value)})"
        for value in dict.fromkeys(values.values())
    )


def _which(folds: Iterable[_Fold]) -> str:
    """Folds by method, in words."""
    numbers: dict[str, list[int]] = {}
    for fold in folds:
        numbers.setdefault(fold.name, []).append(fold.number)
    return "; ".join(
        f"{name}, fold{'s' if len(them) > 1 else ''} {', '.join(map(str, them))}" for name, them in numbers.items()
    )


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
