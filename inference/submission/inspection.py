"""Find what a folder of predictions would submit, and everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from masksam_nnunet.errors import UsageError, in_short
from masksam_nnunet.plans.images import ImageGeometry, check_whole, in_threads, open_nifti
from masksam_nnunet.plans.raw_data import find_dataset

from .cases import expected_names, file_names, find_images, find_phases, find_predictions, match_labels, read_labels
from .rules import ENDING, Rules, UnconfirmedRule, load_rules

_LISTED = 10
_ROUNDING = 2e-4  # scaling in a header leaves 0.9999


@dataclass(frozen=True)
class SubmittedFile:
    """One file to be submitted.

    Attributes:
        name: in the archive, with its folder.
        prediction: the file that it is made from.
        image: the image whose grid it lies on, None if unknown.
        values: the challenge's value for each value of the prediction.
        dtype: of the voxels.
    """

    name: str
    prediction: Path
    image: Path | None
    values: Mapping[int, int]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        title: the challenge and its phase.
        files: what is submitted if there are no defects.
        defects: why nothing can be submitted; each names its file.
        notes: what else the user should know.
        unconfirmed: rules in use that no publication of the challenge states.
    """

    title: str
    files: tuple[SubmittedFile, ...]
    defects: tuple[str, ...]
    notes: tuple[str, ...]
    unconfirmed: tuple[UnconfirmedRule, ...]


def inspect(
    challenge: str,
    predictions: Path,
    *,
    images: Path | None = None,
    dataset: str | None = None,
    dataset_json: Path | None = None,
    override: Path | None = None,
    task: str | None = None,
) -> Inspection:
    """Check a folder of predictions against the rules of a challenge; nothing is written.

    Args:
        challenge: one of ``rules.CHALLENGES``.
        predictions: nnU-Net's predictions; for the decathlon also a folder of such folders, named by task.
        images, dataset, dataset_json, override, task: as ``masksam submit`` describes them.

    Raises:
        UsageError: an option is wrong, or a place that it names.
        DataError: there is no such dataset, or the labels or ACDC's phases are unknown.
    """
    rules = load_rules(challenge, override)
    raw = Path(os.environ["nnUNet_raw"]) / find_dataset(dataset, ("nnUNet_raw",)) if dataset is not None else None
    if images is None and raw is not None and rules.of_test_set and (raw / "imagesTs").is_dir():
        images = raw / "imagesTs"
    files: list[SubmittedFile] = []
    defects: list[str] = []
    notes = list(rules.notes)
    try:
        parts = _parts(Path(os.path.abspath(predictions)), rules.tasks, task)
        for folder, own in parts:
            part_files, part_defects, part_notes = _inspect_part(folder, own, images, raw, dataset_json)
            prefix = f"{own.task}/" if len(parts) > 1 else ""
            files += part_files
            defects += [prefix + defect for defect in part_defects]
            notes += [prefix + note for note in part_notes]
    except OSError as error:
        raise UsageError(f"{error.filename or predictions} cannot be read: {error.strerror}") from error
    present = {own.task for _, own in parts}
    if missing := [name for name in rules.tasks if name not in present]:
        text = f"{len(missing)} of {len(rules.tasks)} tasks are missing: {', '.join(missing)}"
        if parts[0][1].all_tasks:
            defects.append(text)
        else:
            notes.append(f"{text}; for an archive of several tasks, give a folder with a folder for each")
    unconfirmed = tuple(
        rule._replace(value={name: rule.value.get(name) for name in sorted(present)}) if rule.name == "tasks" else rule
        for rule in rules.unconfirmed
    )
    return Inspection(rules.title, tuple(files), tuple(defects), tuple(dict.fromkeys(notes)), unconfirmed)


def _parts(folder: Path, tasks: Mapping[str, Rules], task: str | None) -> list[tuple[Path, Rules]]:
    """The folders of predictions, one for each task, with their rules."""
    if not folder.is_dir():
        raise UsageError(f"PREDICTIONS {folder}: there is no such folder; name the one that nnU-Net predicted into")
    if "" in tasks and task is None:
        return [(folder, tasks[""])]
    if task is not None:
        if not task or task not in tasks:
            there = ", ".join(filter(None, tasks)) or "none; leave it out"
            raise UsageError(f"--task {task}: the challenge's tasks are {there}")
        return [(folder, tasks[task])]
    inside = [name for name in tasks if (folder / name).is_dir()]
    if inside:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if stray := [name for name in names if name not in inside]:
            raise UsageError(f"PREDICTIONS {folder} holds {_listed(stray)} beside folders of tasks; move that away")
        return [(folder / name, tasks[name]) for name in inside]
    stems = [path.name.removesuffix(ENDING) for path in folder.glob(f"[!.]*{ENDING}")]
    fitting = {name: sum(rules.match(stem) is not None for stem in stems) for name, rules in tasks.items()}
    likeliest = max(fitting, key=lambda name: fitting[name])
    if not fitting[likeliest]:
        raise UsageError(f"PREDICTIONS {folder} holds no case of a task; name one with --task")
    return [(folder, tasks[likeliest])]


def _inspect_part(
    folder: Path, rules: Rules, place: Path | None, dataset: Path | None, dataset_json: Path | None
) -> tuple[list[SubmittedFile], list[str], list[str]]:
    """One folder of predictions: its files, defects and notes."""
    beside = [folder / "dataset.json", *([dataset / "dataset.json"] if dataset else [])]
    labels = read_labels([dataset_json] if dataset_json else beside)
    values, defects, notes = match_labels(labels, rules)
    found, misplaced, probabilities = find_predictions(folder, rules)
    images = find_images(place, rules) if place else {}
    if not place:
        missing = "" if rules.expected else ", and missing cases stay unknown"
        notes.append(f"without --images, or -d with imagesTs, no prediction is compared with its image{missing}")
    if probabilities:
        notes.append(f"{probabilities} files of probabilities (.npz, .npy, .pkl) are left out")
    if left_out := sorted(found.keys() & set(rules.left_out)):
        notes.append(f"left out, since the challenge does not take them: {', '.join(left_out)}")
    cases = {case: path for case, path in found.items() if case not in left_out}
    phases = find_phases(place, dataset) if rules.needs_phase else {}
    names, unnamed = file_names(cases, rules, phases)
    wanted, _ = file_names(images.keys() - set(rules.left_out), rules, phases)
    defects += misplaced + unnamed + _set_defects(names, wanted, rules)
    allowed = set(labels.values())
    checks = in_threads(
        lambda case: prediction_defects(cases[case], images.get(case), allowed), list(cases), "checking"
    )
    for path, (wrong, _) in zip(cases.values(), checks, strict=True):
        defects += [f"{path.name}: {defect}" for defect in wrong]
    empty = [path.name for path, (_, is_empty) in zip(cases.values(), checks, strict=True) if is_empty]
    if empty:
        notes.append(f"background only: {_listed(empty)}")
    prefix = rules.folder.format(task=rules.task) + "/" if rules.folder else ""
    files = [
        SubmittedFile(prefix + name, cases[case], images.get(case), values, rules.dtype)
        for case, name in sorted(names.items())
    ]
    return files, defects, notes


def _set_defects(names: Mapping[str, str], images: Mapping[str, str], rules: Rules) -> list[str]:
    """Files that are missing or too many, given the file name of each prediction and of each image."""
    official = expected_names(rules)
    defects = []
    for case, name in names.items():
        if official is not None and name not in official:
            defects.append(f"{case}{ENDING}: {name} is none of the {len(official)} files that the challenge takes")
        elif images and case not in images:
            defects.append(f"{case}{ENDING}: there is no image of this case in --images")
    wanted = {name: f" ({case}{ENDING})" for case, name in images.items() if official is None or name in official}
    optional = {name for case, name in images.items() if rules.optional is not None and rules.optional.fullmatch(case)}
    if optional.isdisjoint(names.values()):
        wanted = {name: text for name, text in wanted.items() if name not in optional}
    for name in sorted(((official or set()) | wanted.keys()) - set(names.values())):
        defects.append(f"{name}: the prediction is missing{wanted.get(name, '')}")
    if rules.counts is not None and len(names) not in rules.counts:
        counts = " or ".join(map(str, rules.counts))
        defects.append(f"there are {len(names)} predictions, the challenge takes exactly {counts}")
    if not names:
        defects.append("there is no prediction")
    return defects


# ---- one file --------------------------------------------------------------------------------------------------------


def prediction_defects(path: Path, image: Path | None, allowed: Set[int]) -> tuple[list[str], bool]:
    """Defects of a file that must lie on ``image`` and hold ``allowed`` values, and whether it is background only."""
    try:
        check_whole(path)
        stored = np.asanyarray(open_nifti(path).dataobj)
    except FileNotFoundError:
        return ["is a link to a file that is not there; copy the prediction itself"], False
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        return [f"cannot be read, it is truncated or damaged ({in_short(error)}); predict this case again"], False
    if stored.ndim != 3:
        return [f"has the shape {stored.shape}, a label map has 3 dimensions"], False
    defects = _grid_defects(path, image) if image else []
    with np.errstate(invalid="ignore"):  # inf - inf
        odd = stored[~(np.abs(stored - np.rint(stored)) <= _ROUNDING)]
    if odd.size:
        what = f"{odd.size} voxels are NaN, infinite or no whole numbers, such as {odd[0]:g} ({stored.dtype})"
        return [*defects, f"is no label map: {what}; give label maps, not probabilities"], False
    values = label_values(stored)
    if foreign := sorted(values - allowed):
        known = ", ".join(map(str, sorted(allowed)))
        defects.append(f"holds the labels {_listed(list(map(str, foreign)))}, dataset.json has only {known}")
    return defects, values <= {0}


def label_values(stored: NDArray[Any]) -> set[int]:
    """The values of a label map (X, Y, Z), rounded; found slice by slice, which sorts little at once."""
    return {int(value) for plane in np.moveaxis(stored, 2, 0) for value in np.unique(np.rint(plane))}


def _grid_defects(path: Path, image: Path) -> list[str]:
    """Where a prediction lies on another grid than its image; one reader that puts them on the same grid is enough.

    A header holds its placement twice, and readers choose: a prediction of nnU-Net repeats what nnU-Net's reader chose.
    """
    try:
        check_whole(image)
        difference = _nibabel_grid(image).difference(_nibabel_grid(path))
    except Exception as error:
        return [f"cannot be compared with its image {image} ({in_short(error)}); unpack the images again"]
    if difference is None:
        return []
    with suppress(RuntimeError):  # ITK refuses axes that are not at right angles
        if _itk_grid(image).difference(_itk_grid(path)) is None:
            return []
    what, wanted, found = (difference[0], *(np.round(np.asarray(value, float), 4).tolist() for value in difference[1:]))
    return [f"{what} {found} is not its image's {wanted}; predict from the challenge's own images"]


def _nibabel_grid(path: Path) -> ImageGeometry:
    """The grid (X, Y, Z) by nibabel, of the first three dimensions."""
    image = open_nifti(path)
    spacing = voxel_sizes(image.affine)
    direction = image.affine[:3, :3] / np.where(spacing == 0, 1, spacing)
    placement = {"origin": image.affine[:3, 3], "direction": direction.ravel()}
    return ImageGeometry(tuple(image.shape[:3]), tuple(map(float, spacing)), placement)


def _itk_grid(path: Path) -> ImageGeometry:
    """The grid (X, Y, Z) by ITK, of the first three dimensions."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    axes = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
    placement = {"origin": np.array(reader.GetOrigin()[:3]), "direction": direction.ravel()}
    return ImageGeometry(tuple(reader.GetSize()[:3]), tuple(reader.GetSpacing()[:3]), placement)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
