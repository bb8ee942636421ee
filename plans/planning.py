"""``masksam plan``: check the dataset, plan it, and print what was decided."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import subdirs
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from rich.console import Console

from masksam_nnunet.backbones import planned_backbones
from masksam_nnunet.errors import DataError
from masksam_nnunet.files import read_json

from .architecture import BASE_PLANS
from .planner import CASCADE, MaskSAMPlanner, Request
from .presets import Preset, load_preset
from .raw_check import require_sound_case
from .raw_data import RawDataset, number_of, read_raw_dataset
from .sizing import LARGEST_FIRST
from .splits import overlaps, read_splits, split_warning
from .summary import Planned, tell

PLANS_NAME = "MaskSAMPlans"


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
        DataError: before anything is written.
    """
    console = console or Console()
    if backbone not in ("auto", *planned_backbones()):
        raise DataError(f"--backbone {backbone!r} is not known: choose auto or one of {', '.join(planned_backbones())}")
    if not (math.isfinite(gpu_memory_gb) and gpu_memory_gb > 0):
        raise DataError(f"--gpu-memory {gpu_memory_gb:g} must be a positive number of GB")
    if plans_name == BASE_PLANS or not re.fullmatch(r"[\w-]+", plans_name) or "__" in plans_name:
        raise DataError(
            f"--plans-name {plans_name!r}: give letters, digits, - and single _, and not nnU-Net's own {BASE_PLANS!r}"
        )
    recipe = _recipe(preset, backbone)
    name = find_dataset(dataset)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    if not (preprocessed / "dataset_fingerprint.json").is_file():
        raise DataError(
            f"-d {dataset}: {name} has no fingerprint in {preprocessed}; run first: "
            f"nnUNetv2_extract_fingerprint -d {number_of(name)} --verify_dataset_integrity"
        )
    raw = read_raw_dataset(Path(os.environ["nnUNet_raw"]) / name, "-d", min_cases=1)
    _check_fingerprint(preprocessed / "dataset_fingerprint.json", len(raw.images), number_of(name))
    require_sound_case(raw, next(iter(raw.images)))
    splits = _splits(raw, preprocessed)

    backbones = LARGEST_FIRST if backbone == "auto" else (backbone,)
    with console.status("planning") as status, _in_words(name, preprocessed):
        planner = MaskSAMPlanner(
            name,
            gpu_memory_gb,
            plans_name=plans_name,
            request=Request(backbones, tuple(configurations), recipe),
            notify=status.update,
            raw=raw,
        )
        plans = planner.plan_experiment()
    unprocessed = _unprocessed(plans, planner.planned, planner.folder, list(raw.images))
    planned = Planned(plans, planner.file, planner.planned, unprocessed)
    patients = split_warning(raw.images, splits, number_of(name))
    tell(
        console,
        planned,
        recipe,
        [*(f"splits_final.json: {text}" for text in overlaps(splits or ())), *([patients] if patients else [])],
    )
    return planned


def _check_fingerprint(file: Path, cases: int, number: int) -> None:
    """Refuse a fingerprint that is damaged or was taken when the dataset had other cases."""
    remedy = f"extract it again: nnUNetv2_extract_fingerprint -d {number} --clean"
    try:
        content = read_json(file)
        sizes = [content[key] for key in ("spacings", "shapes_after_crop")]
        sound = all(math.isfinite(step) and step > 0 for size in sizes for row in size for step in row)
        numbers = {len(size) for size in sizes}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file} is damaged or no fingerprint ({type(error).__name__}: {error}); {remedy}") from error
    if not sound:
        raise DataError(f"{file} holds sizes or voxel sizes that are not positive; {remedy}")
    if numbers != {cases}:
        raise DataError(
            f"{file} is of {' and '.join(map(str, sorted(numbers)))} cases, the dataset has {cases}; {remedy}"
        )


def _splits(raw: RawDataset, preprocessed: Path) -> list[dict[str, list[str]]] | None:
    """The folds that training will use, or None. nnU-Net's planner stops without a message if two files differ."""
    ours, theirs = (
        read_splits(file, raw.images) if (file := folder / "splits_final.json").is_file() else None
        for folder in (preprocessed, raw.folder)
    )
    if ours is None or theirs is None:
        return ours or theirs
    for one, other in zip(theirs, ours, strict=False):
        if any(set(one[part]) != set(other[part]) for part in ("train", "val")):
            raise DataError(
                f"{raw.folder / 'splits_final.json'} and {preprocessed / 'splits_final.json'} hold different folds, "
                "which nnU-Net's planner refuses; remove the one that is not wanted (masksam split --force writes both)"
            )
    return ours


@contextlib.contextmanager
def _in_words(name: str, preprocessed: Path) -> Iterator[None]:
    """What nnU-Net's planner and the file system raise, as an error that says what to do."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"cannot write the plans into {preprocessed}: {error}; make room or make it writable"
        ) from error
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}: planning failed with {type(error).__name__}: {error}; check dataset.json and the fingerprint: "
            f"nnUNetv2_extract_fingerprint -d {number_of(name)} --verify_dataset_integrity --clean"
        ) from error


def find_dataset(dataset: str, variables: Sequence[str] = ("nnUNet_raw", "nnUNet_preprocessed")) -> str:
    """The full name of a dataset given by number or name; ``variables`` must be set.

    Raises:
        DataError: if nnU-Net's folders are not named, or hold no such dataset.
    """
    for variable in variables:
        if not os.environ.get(variable):
            raise DataError(
                f"{variable} is not set: export nnU-Net's folders {' and '.join(variables)} first (where the "
                "raw data are not at hand, work where they are; a plans file can be copied)"
            )
    raw = Path(os.environ["nnUNet_raw"])
    if not raw.is_dir():
        raise DataError(f"nnUNet_raw = {raw}: there is no such folder")
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
    except (RuntimeError, AssertionError, ValueError) as error:
        there = [folder for folder in subdirs(str(raw), join=False) if folder.startswith("Dataset")]
        if "More than one" in str(error):
            names = ", ".join(map(str, find_candidate_datasets(int(dataset))))
            raise DataError(
                f"-d {dataset}: several datasets in nnU-Net's folders have this number: {names}; give each a number of "
                "its own, or the name here"
            ) from error
        raise DataError(f"-d {dataset}: no such dataset; {raw} holds {', '.join(there) or 'none'}") from error
    if not (raw / name).is_dir():
        raise DataError(f"-d {dataset}: {raw} holds no {name}, whose dataset.json and labels are needed")
    return name


def _recipe(preset: str | None, backbone: str) -> Preset | None:
    if preset is None:
        return None
    recipe = load_preset(preset)
    if backbone not in ("auto", recipe.backbone):
        raise DataError(
            f"--backbone {backbone}: --preset {preset} was published with {recipe.backbone}; leave --backbone out"
        )
    return recipe


def _unprocessed(plans: dict[str, Any], configurations: list[str], folder: Path, cases: list[str]) -> list[str]:
    """The configurations with a case that is not preprocessed."""
    manager = PlansManager(plans)
    missing = []
    for name in configurations:
        data = folder / manager.get_configuration(name).data_identifier
        if name != CASCADE and not (data.is_dir() and set(cases) <= set(preprocessed_cases(data))):
            missing.append(name)
    return missing


def preprocessed_cases(folder: Path) -> list[str]:
    """The cases in a folder of preprocessed data; none where it is empty."""
    try:
        return list(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, KeyError):  # an empty folder, or one of several kinds of files
        return []
