"""Whether a comparison is fair: the same splits, data and labels, complete folds, the same minutes, SAM's weights.

What cannot be compared at all is refused. A severe finding is refused too, unless the user accepts it; it then opens
the report. Other findings are stated there. Versions and devices are columns of the report's table of trainings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.environment import RANDOM_INIT
from masksam_nnunet.errors import CheckpointError, DataError, MaskSAMError, TrainingError, UsageError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.methods import Method, has_budget
from masksam_nnunet.inference.scoring import cases_in, read_pair
from masksam_nnunet.plans.architecture import read_config
from masksam_nnunet.plans.raw_data import number_of
from masksam_nnunet.plans.splits import overlaps, read_splits, split_warning

from .folds import FoldRecord, Stage, fold_state, read_fold_compute, training_logs
from .results import Finding, row_names

TIME_TOLERANCE = 1.1
"""Allowed ratio of the longest time budget to the shortest."""
_DESCRIPTION = ("labels", "channel_names", "regions_class_order", "file_ending")
_DATA = (
    *("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "resampling_fn_data"),
    *("resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"),
)
"""Of a configuration in the plans: what makes its preprocessed data."""
_TRAINING = ("patch_size", "batch_size", "batch_dice")


@dataclass(frozen=True)
class _Fold:
    """One trained fold of one method; the name is for messages."""

    method: Method
    number: int
    name: str
    folder: Path


def check_fairness(
    methods: Sequence[Method],
    folds: Sequence[int],
    results: Path,
    preprocessed: Path,
    patients: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """Check that methods were trained and validated on the same terms.

    Args:
        methods: of one configuration, at least one.
        folds: to be compared.
        results, preprocessed: the dataset's folders in nnUNet_results and nnUNet_preprocessed.
        patients: patient by case; None to read them from the case names.

    Returns:
        What bears on fairness, severe findings first.

    Raises:
        MaskSAMError: folds are missing, overlap, or are not trained and validated; a file is not readable.
    """
    description = _read(preprocessed / "dataset.json")
    ending = str(description["file_ending"])
    cases = cases_in(preprocessed / "gt_segmentations", ending)
    splits = read_splits(preprocessed / "splits_final.json", cases)
    findings = check_splits(splits, folds, cases, preprocessed.name, patients)
    names = row_names(methods)
    trained = [
        _Fold(method, fold, f"{names[method]}, fold {fold}", results / method.key / f"fold_{fold}")
        for method in methods
        for fold in folds
    ]
    findings += _check_folds(trained, splits, ending)
    findings += _check_inputs(trained, preprocessed)
    configurations = {names[method]: _configuration(method, results) for method in methods}
    findings += _check_data(configurations)
    for method in methods:
        own = _read(results / method.key / "dataset.json")
        if different := [key for key in _DESCRIPTION if own.get(key) != description.get(key)]:
            values = "; ".join(f"{key}: {own.get(key)} there, {description.get(key)} here" for key in different)
            findings.append(Finding(True, f"{names[method]} was trained with another dataset.json: {values}."))
        own_folds = [fold for fold in trained if fold.method == method]
        findings += _check_start(names[method], configurations[names[method]], own_folds)
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

    Args:
        splits: the content of splits_final.json.
        folds: to be compared.
        cases: all training cases of the dataset.
        patients: patient by case; None to read them from the case names.

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


def faulty_prediction(
    methods: Sequence[Method],
    cases: Mapping[int, Sequence[str]],
    results: Path,
    truths: Path,
    dataset_json: Mapping[str, Any],
) -> str | None:
    """The first validated label map that is damaged or not on its truth's grid, with the remedy; None: all are sound.

    It reads all of them, to explain an error of nnU-Net's functions, which name no file. ``cases`` are the validation
    cases by fold, ``results`` and ``truths`` the dataset's folders of models and of reference label maps.
    """
    for method in methods:
        for fold, names in cases.items():
            validation = results / method.key / f"fold_{fold}" / "validation"
            for case in names:
                try:
                    read_pair(validation, truths, dataset_json, case)
                except MaskSAMError as error:
                    file = validation / (case + dataset_json["file_ending"])
                    return f"{error}. If the truth is right, remove {file} and run masksam benchmark again"
    return None


def _check_folds(trained: Sequence[_Fold], splits: Sequence[Mapping[str, Sequence[str]]], ending: str) -> list[Finding]:
    """Folds must be trained and validated, on the cases of the split, with complete checkpoints, for the same time."""
    findings, refused = [], []
    seconds: dict[str, float] = {}
    for fold in trained:
        wanted = splits[fold.number]["val"]
        state = fold_state(fold.folder, wanted, ending, npz=False)
        if state.stage not in (Stage.DONE, Stage.DAMAGED):
            refused.append(f"{fold.name} is {state.stage.value}: {state.reason} in {fold.folder}")
            continue
        if others := set(cases_in(fold.folder / "validation", ending)) - set(wanted):
            findings.append(Finding(True, f"{fold.name}, has predictions of other cases: {_listed(others)}."))
        try:
            if state.stage is Stage.DAMAGED:
                raise CheckpointError(state.reason)
            compute = read_fold_compute(fold.folder)
        except CheckpointError as error:
            findings.append(Finding(True, f"The checkpoint of {fold.name}, is damaged: {error}."))
        else:
            if has_budget(fold.method) and compute.seconds is not None:
                seconds[fold.name] = compute.seconds
    if refused:
        raise TrainingError("\n- ".join(["these folds cannot be compared; run masksam benchmark again:", *refused]))
    if seconds and max(seconds.values()) > TIME_TOLERANCE * min(seconds.values()):
        told = "; ".join(f"{name}: {value:.0f} s" for name, value in seconds.items())
        findings.append(Finding(True, f"Time budgets differ by more than {TIME_TOLERANCE - 1:.0%}: {told}."))
    return findings


def _check_inputs(trained: Sequence[_Fold], preprocessed: Path) -> list[Finding]:
    """Splits, dataset.json and plans must be those that all folds were trained with."""
    changed: dict[str, list[str]] = {}
    elsewhere = []
    for fold in trained:
        record = FoldRecord.read(fold.folder)
        if record is None or record.inputs is None:
            elsewhere.append(fold.name)
            continue
        for name in record.changed_inputs(preprocessed):
            changed.setdefault(name, []).append(fold.name)
    findings = [
        Finding(True, f"{name} in nnUNet_preprocessed has changed since these folds were trained: {'; '.join(folds)}.")
        for name, folds in changed.items()
    ]
    if elsewhere:
        findings.append(Finding(False, f"Trained elsewhere, with unknown splits and plans: {'; '.join(elsewhere)}."))
    return findings


def _check_data(configurations: Mapping[str, ConfigurationManager]) -> list[Finding]:
    """The models' own plans, side by side."""
    settings = {name: one.configuration for name, one in configurations.items()}
    compared = {key: {who: own.get(key) for who, own in settings.items()} for key in (*_DATA, *_TRAINING)}
    differences = {
        key: values
        for key, values in compared.items()
        if len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) > 1
    }
    findings = [
        Finding(False, f"The methods differ in {key}: " + "; ".join(f"{who}: {v}" for who, v in values.items()) + ".")
        for key, values in differences.items()
    ]
    folders = {str(own.get("data_identifier")) for own in settings.values()}
    if len(folders) == 1:
        disagree = any(key in _DATA for key in differences)
        text = "but their plans disagree on it" if disagree else "and their plans agree on it"
        findings.append(Finding(disagree, f"All methods name the preprocessed data {folders.pop()}, {text}."))
    return findings


def _check_start(name: str, configuration: ConfigurationManager, folds: Sequence[_Fold]) -> list[Finding]:
    """What MaskSAM's encoder starts from."""
    config = read_config(configuration)
    if config is None:
        return []
    if not config.needs_sam:
        return [Finding(False, f"{name} has {config.backbone}, which is not SAM: it says nothing about SAM.")]
    logs = {
        fold.name: "".join(file.read_text(encoding="utf-8", errors="replace") for file in training_logs(fold.folder))
        for fold in folds
    }
    if random := [fold for fold, log in logs.items() if f"{RANDOM_INIT} is set" in log]:
        return [Finding(True, f"SAM's part held random, frozen weights ({RANDOM_INIT}) in {'; '.join(random)}.")]
    if unknown := [fold for fold, log in logs.items() if not log]:
        return [Finding(False, f"Without nnU-Net's log it is not known whether SAM was loaded: {'; '.join(unknown)}.")]
    return [Finding(False, f"{name} starts from SAM's {config.sam} weights, which were trained on other images.")]


def _configuration(method: Method, results: Path) -> ConfigurationManager:
    file = results / method.key / "plans.json"
    try:
        return PlansManager(_read(file)).get_configuration(method.configuration)
    except (KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{file} has no usable configuration {method.configuration!r} ({error}); restore it") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is missing or damaged ({error}); restore it, or train again") from error


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, sorted(names, key=str)))
