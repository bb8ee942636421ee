"""Whether methods saw the same data: their models' own plans and dataset.json, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.errors import BenchmarkError

from .files import read_or_refuse
from .names import row_names
from .results import Finding, Method

_DESCRIPTION = ("labels", "channel_names", "regions_class_order", "file_ending")
_DATA = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "preprocessor_name",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
"""Of a configuration: what makes its preprocessed data."""
_SHARED_DATA = ("transpose_forward", "foreground_intensity_properties_per_channel")
"""The same, of all configurations of the plans."""
_TRAINING = ("patch_size", "batch_size", "batch_dice", "resampling_fn_probabilities")
_LONG = 200  # characters of a value that is still shown


def model_configuration(method: Method, results: Path) -> ConfigurationManager:
    """The configuration in the plans that the model's folder holds.

    Raises:
        BenchmarkError: the plans are missing, not readable, or lack the configuration.
    """
    manager = PlansManager(_read(method, results, "plans.json"))
    try:
        return manager.get_configuration(method.configuration)
    except (KeyError, RuntimeError, ValueError) as error:
        raise BenchmarkError(
            f"{results / method.key / 'plans.json'} has no usable configuration {method.configuration!r} ({error}); "
            "put back the plans that the model was trained with"
        ) from error


def check_models(methods: Sequence[Method], results: Path, description: Mapping[str, Any]) -> list[Finding]:
    """Compare the models' plans with one another, and their dataset.json with the preprocessed one.

    Args:
        methods: to be compared.
        results: the dataset's folder in nnUNet_results.
        description: dataset.json in nnUNet_preprocessed.

    Raises:
        BenchmarkError: a model's plans.json or dataset.json is missing or not readable.
    """
    names = row_names(methods)
    findings = []
    for method in methods:
        own = _read(method, results, "dataset.json")
        different = [key for key in _DESCRIPTION if own.get(key) != description.get(key)]
        if different:
            values = "; ".join(f"{key}: {own.get(key)} there, {description.get(key)} here" for key in different)
            findings.append(
                Finding(
                    True, f"{names[method]} was trained with another dataset.json than the preprocessed one: {values}."
                )
            )
    plans = {names[method]: _read(method, results, "plans.json") for method in methods}
    settings = {names[m]: model_configuration(m, results).configuration for m in methods}
    data = [
        *((name, {who: s.get(name) for who, s in settings.items()}) for name in _DATA),
        *((name, {who: p.get(name) for who, p in plans.items()}) for name in _SHARED_DATA),
    ]
    identifiers = {who: str(s.get("data_identifier")) for who, s in settings.items()}
    return findings + _data_findings(data, identifiers) + _training_findings(settings)


def _data_findings(data: Sequence[tuple[str, Mapping[str, Any]]], identifiers: Mapping[str, str]) -> list[Finding]:
    if len(identifiers) < 2:
        return []
    findings = []
    for name, values in data:
        if _differ(values):
            findings.append(Finding(False, f"The preprocessed data differ in {name}: {side_by_side(values)}."))
    one_folder = not _differ(identifiers)
    if findings and one_folder:
        folder = next(iter(identifiers.values()))
        findings.append(
            Finding(
                True,
                f"All methods name the same preprocessed data, {folder}, but their plans disagree on what it is, so "
                "that one of them was trained on data that its plans do not describe.",
            )
        )
    if not findings and one_folder:
        folder = next(iter(identifiers.values()))
        findings.append(Finding(False, f"All methods were trained on the same preprocessed data, {folder}."))
    elif not findings:
        findings.append(
            Finding(
                False,
                "The methods have preprocessed data of their own, made with the same spacing, normalization and "
                f"resampling: {side_by_side(identifiers)}.",
            )
        )
    return findings


def _training_findings(settings: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for name in _TRAINING:
        values = {who: s.get(name) for who, s in settings.items()}
        if _differ(values):
            findings.append(Finding(False, f"The methods differ in {name}: {side_by_side(values)}."))
    return findings


def side_by_side(values: Mapping[str, Any]) -> str:
    """Who has which value, those with the same one together."""
    groups: dict[str, list[str]] = {}
    for who, value in values.items():
        groups.setdefault(_text(value), []).append(who)
    shown = {text: text if len(text) <= _LONG else f"values number {i + 1}" for i, text in enumerate(groups)}
    return "; ".join(f"{', '.join(members)}: {shown[text]}" for text, members in groups.items())


def _differ(values: Mapping[str, Any]) -> bool:
    return len({_text(value) for value in values.values()}) > 1


def _text(value: Any) -> str:
    """As text: NaN, where no case has foreground, equals itself there, and a tuple its list."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _read(method: Method, results: Path, name: str) -> dict[str, Any]:
    file = results / method.key / name
    content = read_or_refuse(file, "nnU-Net writes it when a fold's training begins: put it back, or train again")
    if not isinstance(content, dict):
        raise BenchmarkError(f"{file} is not nnU-Net's; put back the one that the model was trained with")
    return content
