"""Whether a comparison is fair: the same splits, data and labels, complete folds, the same budget, SAM's weights.

What cannot be compared at all is refused. A severe finding is refused too, unless the user accepts it; it then opens
the report. Other findings are stated there. Versions and devices are columns of the report's table of trainings.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.environment import RANDOM_INIT
from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.methods import ModelName, has_budget
from masksam_nnunet.inference.scoring import cases_in
from masksam_nnunet.plans.architecture import read_config
from masksam_nnunet.plans.raw_data import number_of
from masksam_nnunet.plans.splits import overlaps, read_splits, split_warning
from masksam_nnunet.sam_files import seen_before
from masksam_nnunet.sam_weights import identified

from .folds import FoldRecord, read_logs
from .results import Finding, FoldCompute, row_names

TIME_TOLERANCE = 1.1
"""Allowed ratio of the longest time budget to the shortest."""
FEW_ITERATIONS = 60
"""Twice the warm-up of trainers with a budget."""
_DESCRIPTION = ("labels", "channel_names", "regions_class_order", "file_ending")
_DATA = (
    *("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data"),
    *("resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"),
)
"""The entries of a configuration that decide its preprocessed data."""
_TRAINING = ("patch_size", "batch_size", "batch_dice")


def check_fairness(
    methods: Sequence[ModelName],
    compute: Mapping[str, Sequence[FoldCompute]],
    results: Path,
    preprocessed: Path,
    patients: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """Check that methods were trained and validated on the same terms; severe findings come first.

    Args:
        methods: of one configuration, at least one.
        compute: what each fold took, by the method's name in tables; all folds are trained and validated.
        results, preprocessed: the dataset's folders in nnUNet_results and nnUNet_preprocessed.
        patients: patient by case; None to read them from the case names.

    Raises:
        MaskSAMError: the folds make no cross-validation; a file is not readable.
    """
    description = _read(preprocessed / "dataset.json")
    ending = str(description["file_ending"])
    cases = cases_in(preprocessed / "gt_segmentations", ending)
    splits = read_splits(preprocessed / "splits_final.json", cases)
    folds = [one.fold for one in next(iter(compute.values()))]
    findings: list[Finding] = [*check_splits(splits, folds, cases, preprocessed.name, patients)]
    names = row_names(methods)
    trained = {
        f"{names[method]}, fold {fold}": results / method.key / f"fold_{fold}" for method in methods for fold in folds
    }
    for (name, folder), fold in zip(trained.items(), folds * len(methods), strict=True):
        if others := set(cases_in(folder / "validation", ending)) - set(splits[fold]["val"]):
            findings.append(Finding(True, f"{name}, has predictions of other cases: {_listed(others)}."))
    findings += _check_times({names[method]: compute[names[method]] for method in methods if has_budget(method)})
    findings += _check_inputs(trained, preprocessed)
    configurations = {
        names[method]: PlansManager(_read(results / method.key / "plans.json")).get_configuration(method.configuration)
        for method in methods
    }
    findings += _check_data(configurations)
    starts: dict[Finding, list[str]] = defaultdict(list)
    for method in methods:
        name, own = names[method], _read(results / method.key / "dataset.json")
        if different := [key for key in _DESCRIPTION if own.get(key) != description.get(key)]:
            values = "; ".join(f"{key}: {own.get(key)} there, {description.get(key)} here" for key in different)
            findings.append(Finding(True, f"{name} was trained with another dataset.json: {values}."))
        own_folds = {f"{name}, fold {fold}": trained[f"{name}, fold {fold}"] for fold in folds}
        if start := _check_start(configurations[name], own_folds, preprocessed.name):
            starts[start].append(name)
    findings += [replace(start, text=start.text.replace("{}", "; ".join(found))) for start, found in starts.items()]
    return tuple(sorted(findings, key=lambda finding: not finding.severe))


def refuse_unfair(reasons: Sequence[str], accept_unfair: bool, what: str) -> None:
    """Raise a DataError that lists the reasons, if there are any and the user does not accept them."""
    if reasons and not accept_unfair:
        listed = "\n- ".join([f"{what}:", *reasons])
        raise DataError(f"{listed}\nCorrect it, or give --accept-unfair: the report then opens with this.")


def check_splits(
    splits: Sequence[Mapping[str, Sequence[str]]],
    folds: Sequence[int],
    cases: Sequence[str],
    dataset: str,
    patients: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Check that the folds to be compared make a cross-validation.

    ``splits`` is the content of splits_final.json, ``cases`` are all training cases. Patients by case, or None to read
    them from the case names.

    Raises:
        UsageError: a fold is not in splits_final.json, or is named twice.
        DataError: a fold validates nothing, or two folds validate the same case.
    """
    if missing := [fold for fold in folds if not 0 <= fold < len(splits)]:
        raise UsageError(f"--folds {_listed(missing)}: splits_final.json has folds 0 to {len(splits) - 1}")
    if not folds or len(set(folds)) < len(folds):
        raise UsageError(f"--folds {_listed(folds)}: name each fold once, and at least one")
    chosen = [splits[fold] for fold in folds]
    if empty := [fold for fold in folds if not splits[fold]["val"]]:
        raise DataError(f"--folds {_listed(empty)}: splits_final.json has no validation cases there")
    validated = [case for split in chosen for case in split["val"]]
    if len(set(validated)) < len(validated):
        raise DataError(f"splits_final.json is no cross-validation: {'; '.join(overlaps(chosen))}")
    findings = []
    for fold, split in zip(folds, chosen, strict=True):
        train, val = set(split["train"]), set(split["val"])
        if both := train & val:
            findings.append(Finding(True, f"Fold {fold} validates cases that it was trained on: {_listed(both)}."))
        elif patients is not None and (seen := {patients[c] for c in train} & {patients[c] for c in val}):
            findings.append(Finding(True, f"Fold {fold} validates patients that it was trained on: {_listed(seen)}."))
    left_out = set(cases) - set(validated)
    if len(folds) < len(splits):
        which = f"Only folds {_listed(folds)} of {len(splits)} were compared"
        findings.append(Finding(False, f"{which}: {len(validated)} of {len(cases)} cases."))
    elif left_out:
        findings.append(Finding(True, f"No fold of splits_final.json validates these cases: {_listed(left_out)}."))
    if patients is None:
        # Folds that are not compared keep their place, so that the warning counts them right.
        compared = [split if i in folds else {"train": [], "val": []} for i, split in enumerate(splits)]
        if warning := split_warning(cases, compared, number_of(dataset)):
            findings.append(Finding(True, f"Patients are not kept together: {warning}."))
    return findings


def _check_times(budgets: Mapping[str, Sequence[FoldCompute]]) -> list[Finding]:
    """Trainings with a budget must have taken the same time or the same iterations."""
    counts = {one.iterations for folds in budgets.values() for one in folds}
    seconds = {f"{name}, fold {one.fold}": one.seconds or 0.0 for name, folds in budgets.items() for one in folds}
    if not seconds or max(seconds.values()) <= TIME_TOLERANCE * min(seconds.values()):
        return []
    told = "; ".join(f"{name}: {value:.0f} s" for name, value in seconds.items())
    if len(counts) == 1 and None not in counts:
        return [Finding(False, f"Every training took {counts.pop()} iterations, in different times: {told}.")]
    return [Finding(True, f"Time budgets differ by more than {TIME_TOLERANCE - 1:.0%}: {told}.")]


def few_iterations(compute: Mapping[str, Sequence[FoldCompute]]) -> list[Finding]:
    """What to say of trainings, by name, with a fold of less than :data:`FEW_ITERATIONS`."""
    least = {name: min(one.iterations or FEW_ITERATIONS for one in folds) for name, folds in compute.items()}
    few = [f"{name}: {count}" for name, count in least.items() if count < FEW_ITERATIONS]
    text = f"Fewer than {FEW_ITERATIONS} iterations say little of a method, whose learning rate may still rise"
    return [Finding(False, f"{text}: {'; '.join(few)}.")] if few else []


def _check_inputs(trained: Mapping[str, Path], preprocessed: Path) -> list[Finding]:
    """Splits, dataset.json and plans must be those that all folds were trained with."""
    records = {name: FoldRecord.read(folder) for name, folder in trained.items()}
    changed: dict[str, list[str]] = {}
    for name, record in records.items():
        for file in record.changed_inputs(preprocessed) if record else ():
            changed.setdefault(file, []).append(name)
    findings = [
        Finding(True, f"{name} in nnUNet_preprocessed has changed since these folds were trained: {'; '.join(folds)}.")
        for name, folds in changed.items()
    ]
    if elsewhere := [name for name, record in records.items() if record is None or record.inputs is None]:
        findings.append(Finding(False, f"Trained elsewhere, with unknown splits and plans: {'; '.join(elsewhere)}."))
    return findings


def _check_data(configurations: Mapping[str, ConfigurationManager]) -> list[Finding]:
    """The models' own plans, side by side."""
    settings = {name: one.configuration for name, one in configurations.items()}
    differences = {
        key: "; ".join(f"{who}: {own.get(key)}" for who, own in settings.items())
        for key in (*_DATA, *_TRAINING)
        if len({json.dumps(own.get(key), sort_keys=True, default=str) for own in settings.values()}) > 1
    }
    findings = [Finding(False, f"The methods differ in {key}: {values}.") for key, values in differences.items()]
    folders = {str(own.get("data_identifier")) for own in settings.values()}
    if len(folders) == 1:
        disagree = not differences.keys().isdisjoint(_DATA)
        text = "but their plans disagree on it" if disagree else "and their plans agree on it"
        findings.append(Finding(disagree, f"All methods name the preprocessed data {folders.pop()}, {text}."))
    return findings


def _check_start(configuration: ConfigurationManager, folds: Mapping[str, Path], dataset: str) -> Finding | None:
    """What SAM's part starts from, and whether that has seen the dataset; ``folds`` are folders by name.

    In the text {} stands for the methods of which it is true.
    """
    config = read_config(configuration)
    if config is None:
        return None
    if not config.sam:
        return Finding(False, f"{config.backbone} is not SAM, and says nothing about SAM: {{}}.")
    logs = {fold: "".join(read_logs(folder)) for fold, folder in folds.items()}
    start = re.compile(rf"({RANDOM_INIT}) is set|SAM weights from .*SHA-256 ([0-9a-f]{{64}})")
    # The last one counts: earlier logs may be of trials that left no checkpoint.
    starts = {fold: found[-1] for fold, log in logs.items() if (found := start.findall(log))}
    if random := [fold for fold, (is_random, _) in starts.items() if is_random]:
        return Finding(True, f"SAM's part held random, frozen weights ({RANDOM_INIT}) in {'; '.join(random)}.")
    if unknown := [fold for fold, log in logs.items() if not log]:
        return Finding(False, f"Without nnU-Net's log it is not known whether SAM was loaded: {'; '.join(unknown)}.")
    hashes = {sha256 for _, sha256 in starts.values()}
    files = [identified(sha256) for sha256 in sorted(hashes)]
    if not files or None in files:
        what = "a file that is no published SAM" if files else f"{config.sam}, or a file in its place"
        return Finding(False, f"SAM is {what}, whose training data are not known, in {{}}.")
    texts = [f"SAM is {file.name} in {{}}. Known training data: {file.data}." for file in files if file]
    warnings = {f"{text}." for file in files if file and (text := seen_before(file, dataset))}
    return Finding(False, " ".join([*texts, *sorted(warnings)]))


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is missing or damaged ({error}); restore it, or train again") from error


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, sorted(names, key=str)))
