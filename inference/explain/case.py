"""Which files a case consists of."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from masksam_nnunet.errors import ExplainError
from masksam_nnunet.files import read_json

from ..cases import channel_names

_NEAR = 5  # names to offer for an unknown one


@dataclass(frozen=True)
class CaseFiles:
    """A case as it lies on disk.

    Attributes:
        name: for people, and for the output folder.
        images: one file per channel, or one that holds all.
        label: its label map, if there is one.
        origin: where it was found, in words.
        numbered: whether the images' names tell their channels.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    origin: str
    numbered: bool = True


def find_case(
    dataset: str, description: Mapping[str, Any], case: str | None, images: Sequence[Path], label: Path | None
) -> CaseFiles:
    """The files of a case of the raw dataset, or of ``images``.

    Args:
        dataset: its name, a folder in nnUNet_raw.
        description: the model's dataset.json.
        case: its name; may be missing where ``images`` are given.
        images: one file per channel, for anything that is no case of the dataset.
        label: the label map to show, in place of the dataset's own.

    Raises:
        ExplainError: the case is unknown, or a file is missing.
    """
    if images:
        found = _given(description, case, tuple(images))
    elif case is None:
        raise ExplainError("no case: name one of the dataset, or give its files with --image")
    else:
        found = _of_dataset(dataset, description, case)
    if label is not None:
        found = dataclasses.replace(found, label=label)
    if found.label is not None and not found.label.is_file():
        raise ExplainError(f"--label {found.label}: there is no such file; name the label map, or leave the option out")
    return found


def fold_of(dataset: str, case: str, folds: Sequence[str]) -> str | None:
    """What the split says about a training case, in words; None where there is no split to ask."""
    preprocessed = os.environ.get("nnUNet_preprocessed")
    file = Path(preprocessed or "") / dataset / "splits_final.json"
    if not preprocessed or not file.is_file():
        return None
    splits = read_json(file)
    if not any(case in part for split in splits for part in split.values()):
        return "in no part of the split: not seen in training"
    seen = [fold for fold in folds if fold == "all" or (int(fold) < len(splits) and case in splits[int(fold)]["train"])]
    unseen = [fold for fold in folds if fold not in seen]
    if not seen:
        return f"a validation case of fold {', '.join(folds)}: not seen in training"
    return f"in the training set of fold {', '.join(seen)}" + (
        f", not of fold {', '.join(unseen)}" if unseen else "; the network has seen it, so expect it to be too sure"
    )


def _given(description: Mapping[str, Any], case: str | None, images: tuple[Path, ...]) -> CaseFiles:
    for file in images:
        if not file.is_file():
            raise ExplainError(f"--image {file}: there is no such file")
    channels = channel_names(description)
    if len(images) > len(channels):
        raise ExplainError(
            f"--image: {len(images)} files, but the model was trained on {len(channels)} channels "
            f"({', '.join(channels)}); give one file per channel, in this order"
        )
    name = case or re.sub(r"(_\d{4})?(\.nii)?\.[^.]+$", "", images[0].name)
    return CaseFiles(_safe(name), images, None, "files given with --image", numbered=False)


def _safe(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ExplainError(f"CASE {name!r}: give a plain name, without folders")
    return name


def _of_dataset(dataset: str, description: Mapping[str, Any], case: str) -> CaseFiles:
    if not os.environ.get("nnUNet_raw"):
        raise ExplainError("nnUNet_raw not set: cases are looked for there; export it, or give files with --image")
    folder = Path(os.environ["nnUNet_raw"]) / dataset
    if not folder.is_dir():
        raise ExplainError(f"{folder} is no folder: put the raw dataset there, or give the case's files with --image")
    ending = description["file_ending"]
    found = _listed(folder) or {
        **_in_folder(folder, "imagesTs", "labelsTs", ending),
        **_in_folder(folder, "imagesTr", "labelsTr", ending),
    }
    if case not in found:
        near = difflib.get_close_matches(case, found, n=_NEAR, cutoff=0.5) or sorted(found)[:_NEAR]
        raise ExplainError(
            f"CASE {case!r} is none of the {len(found)} cases of {folder} (imagesTr, imagesTs; files that end in "
            f"{ending!r}); near it: {', '.join(near) or 'none'}. For other files use --image"
        )
    return found[case]


def _listed(folder: Path) -> dict[str, CaseFiles]:
    """The cases that the raw dataset.json lists itself, wherever their files are."""
    file = folder / "dataset.json"
    description = read_json(file) if file.is_file() else {}
    if "dataset" not in description:
        return {}
    entries = get_filenames_of_train_images_and_targets(str(folder), description)
    return {
        str(name): CaseFiles(str(name), tuple(map(Path, entry["images"])), Path(entry["label"]), f"{file} lists it")
        for name, entry in entries.items()
    }


def _in_folder(folder: Path, images: str, labels: str, ending: str) -> dict[str, CaseFiles]:
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    files: dict[str, list[Path]] = {}
    for path in sorted((folder / images).glob(f"*{ending}")):
        if match := pattern.fullmatch(path.name):
            files.setdefault(match[1], []).append(path)
    result = {}
    for name, channels in files.items():
        label = folder / labels / f"{name}{ending}"
        origin = f"{images} of {folder.name}"
        result[name] = CaseFiles(name, tuple(channels), label if label.is_file() else None, origin)
    return result
