"""Check that a training's inputs exist: plans, a configuration in them, preprocessed cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json

from .planning import preprocessed_cases

DEFAULT_PLANS = "nnUNetPlans"
RESENC_PLANNERS = {f"nnUNetResEncUNet{size}Plans": f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL")}
"""nnU-Net's planners by the plans that they make."""


def require_configuration(folder: Path, plans: str, configuration: str, number: int, who: str) -> ConfigurationManager:
    """A configuration of the plans in a dataset's preprocessed ``folder``; ``who`` wants it, for the message.

    Raises:
        DataError: the plans, or dataset.json beside them, are missing or damaged, or have no such configuration.
    """
    file = folder / f"{plans}.json"
    command = planning_command(plans, number)
    if not file.is_file():
        raise DataError(f"{who}: there is no {file}; make it with: {command}")
    if not (folder / "dataset.json").is_file():
        raise DataError(f"there is no {folder / 'dataset.json'}, which planning writes; plan again with: {command}")
    try:
        content = read_json(file)
        configurations = list(content["configurations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a whole plans file ({error!r}); make it again with: {command}") from error
    if configuration not in configurations:
        raise DataError(f"-c {configuration}: {file} has no such configuration, but {', '.join(configurations)}")
    return PlansManager(content).get_configuration(configuration)


def require_cases(
    folder: Path, plans: str, configuration: str, data: str, number: int, who: str, cases: Sequence[str] = ()
) -> list[str]:
    """The preprocessed cases of a configuration, in ``folder / data``; at least one, and all of ``cases``.

    Raises:
        DataError: they are not there.
    """
    there = preprocessed_cases(folder / data) if (folder / data).is_dir() else []
    missing = sorted(set(cases) - set(there))
    if missing or not there:
        lacking = f"misses {len(missing)} of {len(cases)} cases, such as {missing[0]}" if missing else "holds no case"
        raise DataError(
            f"{who}: {folder / data} {lacking}; preprocess them with: nnUNetv2_preprocess -d {number} "
            f"-plans_name {plans} -c {configuration}"
        )
    return there


def planning_command(plans: str, number: int) -> str:
    """The command that makes plans of this name for a dataset."""
    if plans == DEFAULT_PLANS:
        return f"nnUNetv2_plan_and_preprocess -d {number}"
    if plans in RESENC_PLANNERS:
        return f"nnUNetv2_plan_experiment -d {number} -pl {RESENC_PLANNERS[plans]}"
    if "MaskSAM" in plans:
        return f"masksam plan -d {number} --plans-name {plans}"
    return f"nnUNetv2_plan_experiment -d {number} -overwrite_plans_name {plans}, with the planner it was made for"
