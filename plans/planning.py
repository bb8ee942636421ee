"""``masksam plan``: checks the inputs, runs the planner, and prints decisions, reasons and the next commands."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from rich.console import Console
from rich.table import Table

from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import DataError, MaskSAMError, in_short
from masksam_nnunet.files import read_json

from .architecture import BASE_PLANS, DECISIONS
from .planner import CASCADE, FULL, LOW, MaskSAMPlanner
from .presets import load_preset
from .raw_data import RawDataset, find_dataset, number_of, read_raw_dataset
from .sizing import LARGEST_FIRST, Limits
from .speed import ASSUMED, CPU, find_device
from .splits import SPLITS_FILE, Fold, overlaps, read_splits, split_warning, unordered
from .training_inputs import preprocessed_cases

_EXTRACT = "extract the fingerprint with: nnUNetv2_extract_fingerprint --verify_dataset_integrity --clean -d"


def plan_dataset(
    dataset: str,
    configurations: Sequence[str] = (),
    backbone: str = "auto",
    gpu_memory_gb: float | None = None,
    preset: str | None = None,
    plans_name: str = "MaskSAMPlans",
    hours: float = 24.0,
    gpu: str | None = None,
    generator: str = "light",
    console: Console | None = None,
) -> MaskSAMPlanner:
    """Plan a dataset; print what was decided and why, and the next commands. Returns the planner with its plans.

    Args:
        dataset: number or name.
        configurations, plans_name: see :class:`MaskSAMPlanner`.
        backbone: ``auto`` is the largest SAM that fits memory and time.
        gpu_memory_gb: of the device to train on; None for what it has.
        preset: name of a published setting.
        hours: that the training of a fold may take.
        gpu: the device to train on, see :func:`find_device`.
        generator: of the prompts, ``light``, ``unet`` or ``resenc``.
        console: where to print.

    Raises:
        DataError: before any plans are written.
    """
    console = console or Console()
    for option, number, unit in (("--gpu-memory", gpu_memory_gb, "GB"), ("--hours", hours, "hours")):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise DataError(f"{option} {number:g} must be a positive number of {unit}")
    if plans_name == BASE_PLANS or not re.fullmatch(r"[\w-]+", plans_name) or "__" in plans_name:
        raise DataError(
            f"--plans-name {plans_name!r}: use letters, digits, - and single _, and not nnU-Net's own {BASE_PLANS!r}"
        )
    published = load_preset(preset) if preset else None
    if published and backbone not in ("auto", published.backbone):
        raise DataError(f"--backbone {backbone}: --preset {preset} was published with {published.backbone}")
    if published and generator != "light":
        raise DataError(f"--generator {generator}: --preset {preset} was published with the light one")
    name = find_dataset(dataset)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    raw = read_raw_dataset(Path(os.environ["nnUNet_raw"]) / name, "-d", min_cases=1)
    _check_fingerprint(preprocessed / "dataset_fingerprint.json", len(raw.images), number_of(name))
    splits = _splits(raw, preprocessed)
    backbones = LARGEST_FIRST if backbone == "auto" else (backbone,)
    with console.status("measuring the device"):
        device = find_device(gpu)
    try:
        with console.status("planning; estimates of memory and time take some seconds"):
            limits = Limits(device.memory_gb if gpu_memory_gb is None else gpu_memory_gb, hours, device)
            planner = MaskSAMPlanner(raw, limits, plans_name, backbones, configurations, published, generator)
            planner.plan_experiment()
    except OSError as error:
        raise DataError(f"cannot write the plans into {preprocessed}: {error}") from error
    except MaskSAMError:
        raise
    except Exception as error:  # nnU-Net's
        raise DataError(
            f"{name}: planning failed with {in_short(error)}; run masksam check -d {raw.number}, and "
            f"{_EXTRACT} {raw.number}"
        ) from error
    warnings = [f"{SPLITS_FILE}: {text}" for text in overlaps(splits or ())]
    if by_case := split_warning(raw.images, splits, number_of(name)):
        warnings.append(by_case)
    if gpu is None and device.name == ASSUMED:
        warnings.append(f"no GPU here: planned for an {ASSUMED}; --gpu cpu plans for this machine, --gpu for others")
    _print(console, planner, [*warnings, *_too_long(planner)])
    return planner


def _too_long(planner: MaskSAMPlanner) -> list[str]:
    """Warnings of trainings that take more than the hours asked for."""
    limits, remedy = planner.limits, "give more --hours, or a faster --gpu"
    if planner.preset is not None:
        remedy = f"--preset {planner.preset.name} keeps its epochs"
    elif limits.device.name == CPU:
        remedy = 'docs/own_dataset.md, "Without a GPU", plans small patches for a training as long as you like'
    return [
        f"{name}: a fold takes about {hours:.3g} hours, more than --hours {limits.hours:g}; {remedy}"
        for name, hours in planner.expected_hours.items()
        if hours > limits.hours
    ]


def _check_fingerprint(file: Path, cases: int, number: int) -> None:
    """Refuse a fingerprint that is missing, damaged or of another number of cases."""
    try:
        content = read_json(file)
        for key in ("spacings", "shapes_after_crop"):
            sizes = np.array(content[key], float)
            if sizes.shape != (cases, 3) or not (np.isfinite(sizes) & (sizes > 0)).all():
                raise ValueError(f"{key} must be {cases} times three positive numbers, one for each case")
        intensities = content.get("foreground_intensity_properties_per_channel", {}).values()
        if not all(math.isfinite(value) for channel in intensities for value in channel.values()):
            raise ValueError("the foreground has no intensities: does any label map hold foreground?")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be used ({in_short(error)}); {_EXTRACT} {number}") from error


def _splits(raw: RawDataset, preprocessed: Path) -> list[Fold] | None:
    """The folds that training will use, or None. nnU-Net's planner fails without a message if the two files differ."""
    files = [folder / SPLITS_FILE for folder in (preprocessed, raw.folder)]
    found = [read_splits(file, raw.images) for file in files if file.is_file()]
    # The preprocessed dataset may have further folds.
    if any(unordered(splits) != unordered(found[0])[: len(splits)] for splits in found):
        raise DataError(
            f"{files[0]} and {files[1]} differ, which nnU-Net refuses; remove one, or write both with masksam split "
            "--force"
        )
    return found[0] if found else None


def _unprocessed(planner: MaskSAMPlanner) -> list[str]:
    """The configurations with a case that is not preprocessed."""
    manager, cases = PlansManager(planner.plans), set(planner.raw.images)
    folders = {
        c: planner.folder / manager.get_configuration(c).data_identifier for c in planner.planned if c != CASCADE
    }
    return [name for name, folder in folders.items() if not cases <= set(preprocessed_cases(folder))]


def _print(console: Console, planner: MaskSAMPlanner, warnings: Sequence[str]) -> None:
    def say(text: str, **style: Any) -> None:  # paths and commands must stay on one line to be copied
        console.print(text, soft_wrap=True, highlight=False, markup=False, **style)

    plans, published, number = planner.plans, planner.preset, planner.raw.number
    decided = {name: plans[DECISIONS][name]["decided"] for name in planner.planned if name != CASCADE}
    for name, rows in decided.items():
        table = Table(title=f"{plans['dataset_name']}, {plans['plans_name']}, {name}", title_justify="left")
        for column in ("", "value", "why"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(row["what"], str(row["value"]), row["why"])
        console.print(table, markup=False)
    if CASCADE in planner.planned:
        say(f"{CASCADE}: the network of {FULL}, with the labels of {LOW} as additional channels")
    if published is not None:
        say(f"Notes on the published setting {published.name} (mean Dice {published.dice} in the paper):")
        for note in published.notes:
            say(f"  - {note}")
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")
    say(f"Plans: {planner.file}")
    steps = []
    unprocessed = " ".join(_unprocessed(planner))
    if unprocessed:
        steps.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans['plans_name']} -c {unprocessed} -np 4")
    else:
        say("No preprocessing is needed: nnU-Net's preprocessed data are used.")
    backbones = {name: next(r["value"] for r in rows if r["what"] == "backbone") for name, rows in decided.items()}
    steps += [f"masksam weights {name}" for name in sorted(set(backbones.values()) - {"tiny"})]
    if str(trainer_folder()) not in os.environ.get(EXT_TRAINER, "").split(os.pathsep):
        steps.append('eval "$(masksam env)"')
    first = FULL if FULL in decided else next(iter(decided))
    # The results of the tiny encoder must say that it is not SAM.
    own = "MaskSAMTrainer_tiny" if backbones[first] == "tiny" else "MaskSAMTrainer"
    trainer = published.trainer if published else own
    device = " -device cpu" if planner.limits.device.name == CPU else ""
    steps.append(f"nnUNetv2_train {number} {first} 0 -p {plans['plans_name']} -tr {trainer}{device}")
    say("Next:")
    for step in steps:
        say(f"  {step}")
