"""The cases of a submission: predictions, their images, and the names and labels that the challenge gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import read_json
from masksam_nnunet.plans.datasets.acdc import named_frames
from masksam_nnunet.plans.datasets.conversion import nifti_names

from .rules import ENDING, Rules

_FRAMES = "frames.json"
_IMAGE_ENDINGS = (ENDING, ".nii", ".mha", ".mhd", ".nrrd", ".hdr", ".img", ".tif", ".tiff", ".png")
_PROBABILITIES = (".npz", ".npy", ".pkl")
_OF_NNUNET = (
    *("dataset.json", "plans.json", "predict_from_raw_data_args.json", "summary.json"),
    *("postprocessing.json", "postprocessing.pkl"),
)


def find_predictions(folder: Path, rules: Rules) -> tuple[dict[str, Path], list[str], int]:
    """Sort the content of a folder of predictions; hidden files and what nnU-Net writes beside them are ignored.

    Returns:
        The file of each case, even where its extension is wrong; files that do not belong there and cases with
        several files; the number of files of probabilities.
    """
    cases: dict[str, Path] = {}
    defects: list[str] = []
    probabilities = 0
    images: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name in _OF_NNUNET:
            continue
        ending = next((end for end in _IMAGE_ENDINGS if name.lower().endswith(end)), None)
        if ending and not path.is_dir():
            images.setdefault(name[: -len(ending)], []).append(name)
        elif path.suffix in _PROBABILITIES:
            probabilities += 1
        else:
            defects.append(f"{name}: does not belong in a folder of predictions")
    for case, names in images.items():
        known = rules.match(case) is not None
        if known:
            cases[case] = folder / (case + ENDING if case + ENDING in names else names[0])
        if len(names) > 1:
            defects.append(f"{case}: there are several files, {' and '.join(names)}; remove all but one")
        elif not names[0].endswith(ENDING):
            defects.append(f"{names[0]}: predictions must end in {ENDING}")
        elif not known:
            defects.append(f"{names[0]}: cases are named like {rules.case.pattern}{ENDING}")
    return cases, defects, probabilities


def find_images(folder: Path, rules: Rules) -> dict[str, Path]:
    """The image of each case in a folder: nnU-Net's CASE_0000, or as in the download, also in folders of patients.

    Raises:
        UsageError: there is none.
    """
    places = [folder]
    if rules.task:
        places += [folder / rules.task / "imagesTs", folder / rules.task, folder / "imagesTs"]
    for place in places:
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

    Args:
        images: the folder given with --images: the converted imagesTs or the download's testing.
        dataset: the raw dataset given with -d.

    Raises:
        DataError: there is neither, or frames.json cannot be read.
    """
    for place in [place for place in (images, images.parent if images else None, dataset) if place]:
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


def file_names(
    cases: Mapping[str, Path], rules: Rules, phases: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """The challenge's file name of each case, and why some have none or share one."""
    names: dict[str, str] = {}
    defects: list[str] = []
    cases_of: dict[str, list[str]] = {}
    for case in cases:
        fields = {**(rules.match(case) or {}), "case": case, "task": rules.task}
        if rules.needs_phase:
            if phases is None or phases.get(case) not in ("ED", "ES"):
                defects.append(f"{case}: neither {_FRAMES} nor Info.cfg says whether this frame is ED or ES")
                continue
            fields["phase"] = phases[case]
        names[case] = rules.file_name.format(**fields)
        cases_of.setdefault(names[case], []).append(case)
    defects += [f"{' and '.join(same)} would both be {name}" for name, same in cases_of.items() if len(same) > 1]
    return names, defects


def expected_names(rules: Rules) -> set[str] | None:
    """The complete list of files; None if the rules do not give it."""
    if rules.expected is None:
        return None
    rows = product(*rules.expected.values())
    return {rules.file_name.format(**dict(zip(rules.expected, row, strict=True))) for row in rows}


# ---- labels by name --------------------------------------------------------------------------------------------------


def read_labels(places: Sequence[Path]) -> dict[str, int]:
    """The labels by name in the first dataset.json that exists, without the ignore label, which no prediction holds.

    Raises:
        DataError: there is no file, it cannot be read, or its labels are missing or regions.
    """
    path = next((path for path in places if path.is_file()), places[0])
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; give the model's with --dataset-json or -d") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict) or not labels or not all(type(value) is int for value in labels.values()):
        raise DataError(
            f"{path}: labels must be whole numbers by name, not {labels!r}; for regions, name a file of the values "
            "that predictions hold with --dataset-json"
        )
    return {name: value for name, value in labels.items() if name != "ignore"}


def match_labels(model: Mapping[str, int], rules: Rules) -> tuple[dict[int, int], list[str], list[str]]:
    """Find the challenge's label for each of a model's labels, by name or by a name in ``also_called``.

    Upper and lower case, spaces, underscores and punctuation do not count.

    Returns:
        The challenge's value for each value that a prediction may hold; names of the model or of the challenge without
        a partner; a note on labels of the challenge that stay empty.
    """
    labels = rules.labels
    known = {_plain(name): name for name in labels}
    for name, others in rules.also_called.items():
        if name in labels:
            for other in others:
                known.setdefault(_plain(other), name)
    values: dict[int, int] = {}
    matched: dict[str, list[str]] = {}
    defects: list[str] = []
    for name, value in model.items():
        target = known.get(_plain(name))
        if target is None:
            defects.append(
                f"label {name!r} ({value}) in dataset.json is none of the challenge's ({', '.join(labels)}); if it is "
                'one by another name, give --rules with {"also_called": {CHALLENGE\'S NAME: [NAME, ...]}}'
            )
        else:
            values[value] = labels[target]
            matched.setdefault(target, []).append(name)
    for target, names in matched.items():
        if len(names) > 1:
            defects.append(f"labels {names} in dataset.json are all {target!r} of the challenge")
    missing = ", ".join(f"{name} ({value})" for name, value in labels.items() if name not in matched)
    notes: list[str] = []
    if missing and rules.all_labels:
        defects.append(f"dataset.json has no labels {missing} of the challenge; use a model that was trained on them")
    elif missing:
        notes = [f"the model does not know {missing}: they stay empty, which scores 0 where they are in the truth"]
    return values, defects, notes


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))
