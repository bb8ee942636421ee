"""``masksam plan``: the checks before, the planner, and what is told after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import subdirs
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from rich.console import Console
from rich.table import Table

from masksam_nnunet.config import BACKBONES
from masksam_nnunet.json_files import read_json

from .architecture import DECISIONS
from .errors import PlanError
from .planner import BASE_PLANS, CASCADE, LOW, MaskSAMPlanner, Request
from .presets import Preset, load_preset
from .raw_data import read_raw_dataset
from .sizing import LARGEST_FIRST
from .splits import split_warning

PLANS_NAME = "MaskSAMPlans"
_OWN_TRAINERS = {"vit_t": "MaskSAMTrainer_vit_t"}  # results are to say that it is not SAM


@dataclass(frozen=True)
class Planned:
    """What was planned.

    Attributes:
        plans: their content.
        file: where they are.
        configurations: those planned now; the file may hold others, from before.
        unprocessed: those of them whose data are not preprocessed yet.
    """

    plans: dict[str, Any]
    file: Path
    configurations: list[str]
    unprocessed: list[str]


def plan_dataset(
    dataset: str,
    configurations: Sequence[str] = (),
    backbone: str = "auto",
    gpu_memory_gb: float = 24.0,
    preset: str | None = None,
    plans_name: str = PLANS_NAME,
    console: Console | None = None,
) -> Planned:
    """Plan a dataset and print what was decided and why, and what comes next.

    Args:
        dataset: number or name.
        configurations: to plan; all that nnU-Net has if empty.
        backbone: ``auto`` is the largest SAM that fits.
        gpu_memory_gb: of the card to train on.
        preset: name of a published setting.
        plans_name: of the file, without ``.json``.
        console: where to print.

    Raises:
        PlanError: before anything is written.
    """
    console = console or Console()
    if backbone not in ("auto", *BACKBONES):
        raise PlanError(f"--backbone {backbone!r} is not known: choose auto or one of {', '.join(BACKBONES)}")
    if not gpu_memory_gb > 0:
        raise PlanError(f"--gpu-memory {gpu_memory_gb:g} must be a positive number of GB")
    if plans_name == BASE_PLANS or not plans_name or Path(plans_name).name != plans_name:
        raise PlanError(f"--plans-name {plans_name!r}: give a file name that is not nnU-Net's own {BASE_PLANS!r}")
    recipe = _recipe(preset, backbone)
    name = find_dataset(dataset)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    if not (preprocessed / "dataset_fingerprint.json").is_file():
        raise PlanError(
            f"-d {dataset}: {name} has no fingerprint in {preprocessed}; run first: "
            f"nnUNetv2_extract_fingerprint -d {_number(name)} --verify_dataset_integrity"
        )
    raw = read_raw_dataset(Path(os.environ["nnUNet_raw"]) / name, "-d", min_cases=1)

    backbones = LARGEST_FIRST if backbone == "auto" else (backbone,)
    with console.status("planning") as status:
        planner = MaskSAMPlanner(
            name,
            gpu_memory_gb,
            plans_name=plans_name,
            request=Request(backbones, tuple(configurations), recipe),
            notify=status.update,
        )
        plans = planner.plan_experiment()
    unprocessed = _unprocessed(plans, planner.planned, planner.folder, list(raw.images))
    planned = Planned(plans, planner.folder / f"{plans_name}.json", planner.planned, unprocessed)
    splits = planner.folder / "splits_final.json"
    warning = split_warning(raw.images, read_json(splits) if splits.is_file() else None, _number(name))
    _tell(console, planned, recipe, warning)
    return planned


def find_dataset(dataset: str) -> str:
    """The full name of a dataset given by number or name.

    Raises:
        PlanError: if nnU-Net's folders are not named, or hold no such dataset.
    """
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if not os.environ.get(variable):
            raise PlanError(f"{variable} is not set: export nnU-Net's folders nnUNet_raw and nnUNet_preprocessed first")
    raw = Path(os.environ["nnUNet_raw"])
    if not raw.is_dir():
        raise PlanError(f"nnUNet_raw = {raw}: there is no such folder")
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
    except (RuntimeError, AssertionError, ValueError) as error:
        there = [folder for folder in subdirs(str(raw), join=False) if folder.startswith("Dataset")]
        if "More than one" in str(error):
            raise PlanError(f"-d {dataset}: several datasets have this number; give the name: {there}") from error
        raise PlanError(f"-d {dataset}: no such dataset; {raw} holds {', '.join(there) or 'none'}") from error
    if not (raw / name).is_dir():
        raise PlanError(f"-d {dataset}: {raw} holds no {name}; planning reads its dataset.json and labels")
    return name


def _recipe(preset: str | None, backbone: str) -> Preset | None:
    if preset is None:
        return None
    recipe = load_preset(preset)
    if backbone not in ("auto", recipe.backbone):
        raise PlanError(
            f"--backbone {backbone}: --preset {preset} was published with {recipe.backbone}; leave --backbone out"
        )
    return recipe


def _unprocessed(plans: dict[str, Any], configurations: list[str], folder: Path, cases: list[str]) -> list[str]:
    """Those configurations whose folder of preprocessed data lacks a case."""
    manager = PlansManager(plans)
    missing = []
    for name in configurations:
        data = folder / manager.get_configuration(name).data_identifier
        if name != CASCADE and not (data.is_dir() and set(cases) <= set(_preprocessed(data))):
            missing.append(name)
    return missing


def _preprocessed(folder: Path) -> list[str]:
    try:
        return list(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, KeyError):  # an empty folder, or one of several kinds of files
        return []


def _number(name: str) -> int:
    return int(name[len("Dataset") : len("Dataset000")])


def _tell(console: Console, planned: Planned, recipe: Preset | None, warning: str | None) -> None:
    plans, number = planned.plans, _number(planned.plans["dataset_name"])
    decisions = {name: plans[DECISIONS]["configurations"][name] for name in planned.configurations if name != CASCADE}
    for name, rows in decisions.items():
        table = Table(title=f"{plans['dataset_name']}, {plans['plans_name']}, {name}", title_justify="left")
        for column in ("", "value", "why"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(row["what"], str(row["value"]), row["why"])
        console.print(table)
    if CASCADE in planned.configurations:
        console.print(f"{CASCADE}: the network of 3d_fullres, with the labels of {LOW} as more channels")
    if recipe is not None:
        console.print(f"The published setting ({recipe.name}, {recipe.dice} mean Dice in the paper) means here:")
        for note in recipe.notes:
            console.print(f"  - {note}", highlight=False)
    if warning is not None:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(f"Plans: {planned.file}", soft_wrap=True, highlight=False)
    if planned.unprocessed:
        wanted = " ".join(planned.unprocessed)
        command = f"nnUNetv2_preprocess -d {number} -plans_name {plans['plans_name']} -c {wanted} -np 4"
        console.print(f"Next: {command}", soft_wrap=True, highlight=False)
    else:
        console.print("No preprocessing is needed: the data preprocessed for nnU-Net are used.", highlight=False)
    first = "3d_fullres" if "3d_fullres" in decisions else next(iter(decisions))
    backbone = next(row["value"] for row in decisions[first] if row["what"] == "backbone")
    trainer = recipe.trainer if recipe else _OWN_TRAINERS.get(backbone, "MaskSAMTrainer")
    if backbone != "vit_t":
        console.print(f"Once: masksam weights {backbone}", highlight=False)
    command = f"nnUNetv2_train {number} {first} 0 -p {plans['plans_name']} -tr {trainer}"
    console.print(f"Then: {command}", soft_wrap=True, highlight=False)
