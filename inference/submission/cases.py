"""The cases of a submission: predictions, their images, and the names and labels that the challenge gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from pydantic import StrictInt, TypeAdapter

from masksam_nnunet.errors import DataError, UsageError, in_short
from masksam_nnunet.files import read_json
from masksam_nnunet.plans.datasets.acdc import named_frames
from masksam_nnunet.plans.datasets.conversion import nifti_names

from .rules import ENDING, Rules

_FRAMES = "frames.json"
_PROBABILITIES = (".npz", ".npy", ".pkl")


def find_predictions(folder: Path, rules: Rules) -> tuple[dict[str, Path], list[str], int]:
    """Sort the content of a folder of predictions; hidden files and JSON, which nnU-Net writes there, are ignored.

    Returns:
        The file of each case; files that do not belong there; the number of files of probabilities.
    """
    cases: dict[str, Path] = {}
    defects: list[str] = []
    probabilities = 0
    for path in sorted(folder.iterdir()):
        case = path.name.removesuffix(ENDING)
        if path.name.startswith(".") or path.suffix == ".json":
            continue
        if path.suffix in _PROBABILITIES:
            probabilities += 1
        elif case != path.name and rules.match(case) is not None:
            cases[case] = path
        else:
            defects.append(f"{path.name}: does not belong here; predictions are named {rules.case.pattern}{ENDING}")
    return cases, defects, probabilities


def find_images(folder: Path, rules: Rules) -> dict[str, Path]:
    """The image of each case: nnU-Net's CASE_0000, or as in the download or a patient's folder; UsageError if none."""
    for place in (folder, folder / rules.task / "imagesTs", folder / rules.task, folder / "imagesTs"):
        if found := _images_in(place, rules):
            return found
    patients = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = {case: image for patient in patients for case, image in _images_in(patient, rules).items()}
    if not found:
        raise UsageError(f"--images {folder} holds no image like {rules.case.pattern}{ENDING}; give the predicted ones")
    return found


def _images_in(folder: Path, rules: Rules) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in nifti_names(folder):
        stem = name.removesuffix(ENDING)
        for case in (stem, stem.removesuffix("_0000")):
            if rules.match(case) is not None:
                found.setdefault(case, folder / name)
    return found


def find_phases(images: Path | None, dataset: Path | None) -> dict[str, str]:
    """ED or ES for each case of ACDC, from frames.json of ``masksam convert acdc`` or Info.cfg of the download.

    ``images`` is the converted imagesTs or the download's testing, ``dataset`` the raw dataset.

    Raises:
        DataError: there is neither, or frames.json cannot be read.
    """
    for place in filter(None, (images, images and images.parent, dataset)):
        if (place / _FRAMES).is_file():
            try:
                return {str(case): str(phase) for case, phase in read_json(place / _FRAMES).items()}
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{place / _FRAMES} cannot be read: {error}; convert the download again") from error
    phases: dict[str, str] = {}
    for patient in sorted(images.glob("patient*")) if images else ():
        phases |= named_frames(patient)
    if not phases:
        raise DataError(
            f"no {_FRAMES} or Info.cfg says which frame is end-diastole: give -d with a dataset of masksam convert "
            "acdc, or --images with the download's folder testing"
        )
    return phases


def file_names(cases: Iterable[str], rules: Rules, phases: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The challenge's file name of each case, and why some have none or share one."""
    names: dict[str, str] = {}
    defects: list[str] = []
    for case in cases:
        if rules.needs_phase and phases.get(case) not in ("ED", "ES"):
            defects.append(f"{case}: neither {_FRAMES} nor Info.cfg says whether this frame is ED or ES")
            continue
        fields = {**(rules.match(case) or {}), "case": case, "task": rules.task, "phase": phases.get(case)}
        name = rules.file_name.format(**fields)
        defects += [f"{other} and {case} would both be {name}" for other, used in names.items() if used == name]
        names[case] = name
    return names, defects


def expected_names(rules: Rules) -> set[str] | None:
    """The complete list of files; None if the rules do not give it."""
    if rules.expected is None:
        return None
    rows = product(*rules.expected.values())
    return {rules.file_name.format(**dict(zip(rules.expected, row, strict=True))) for row in rows}


# ---- labels by name --------------------------------------------------------------------------------------------------


def read_labels(places: Sequence[Path]) -> dict[str, int]:
    """The labels by name in the first dataset.json that exists, without the ignore label; DataError if none."""
    path = next((path for path in places if path.is_file()), places[0])
    try:
        labels = TypeAdapter(dict[str, StrictInt]).validate_python(dict(read_json(path))["labels"])
    except (OSError, ValueError, TypeError, LookupError) as error:  # ValueError: JSON's and pydantic's
        raise DataError(
            f"{path} cannot be read, or has no labels that are whole numbers by name ({in_short(error)}); name the "
            "model's, or for regions a file of the values that predictions hold, with --dataset-json"
        ) from error
    return {name: value for name, value in labels.items() if name != "ignore"}


def match_labels(model: Mapping[str, int], rules: Rules) -> tuple[dict[int, int], list[str], list[str]]:
    """Find the challenge's label for each of a model's labels, by name or by a name in ``also_called``.

    Upper and lower case, spaces, underscores and punctuation do not count.

    Returns:
        The challenge's value for each value that a prediction may hold; names of the model or of the challenge without
        a partner; a note on labels of the challenge that stay empty.
    """
    labels = rules.labels
    known = {_plain(other): name for name in labels for other in rules.also_called.get(name, ())}
    known |= {_plain(name): name for name in labels}
    targets = {name: known.get(_plain(name)) for name in model}
    defects = [
        f"label {name!r} ({model[name]}) in dataset.json is none of the challenge's ({', '.join(labels)}); if it is "
        'one by another name, give --rules with {"also_called": {CHALLENGE\'S NAME: [NAME, ...]}}'
        for name, target in targets.items()
        if target is None
    ]
    values = {model[name]: labels[target] for name, target in targets.items() if target is not None}
    for label in labels:
        if len(names := [name for name, target in targets.items() if target == label]) > 1:
            defects.append(f"labels {names} in dataset.json are all {label!r} of the challenge")
    missing = ", ".join(f"{name} ({value})" for name, value in labels.items() if name not in targets.values())
    if missing and rules.all_labels:
        defects.append(f"dataset.json has no labels {missing} of the challenge; use a model that was trained on them")
        missing = ""
    notes = [f"the model does not know {missing}: they stay empty, which scores 0 where they are in the truth"]
    return values, defects, notes if missing else []


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))
