"""What lies in the input folder, and what is wanted in the output folder.

Grand Challenge's interface, after its own source (comic/grand-challenge.org, 2026: ``components/serializers.py``,
``components/backends/base.py``): ``inputs.json`` lists the inputs, each with ``socket`` (``interface`` for older
algorithms): ``slug``, ``relative_path``, ``super_kind``. An image lies in the folder ``relative_path``. The platform
imports exactly one MHA or TIFF file from the folder of an image output.

AMOS 2022's test phase: files in the input folder, predictions under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from masksam_nnunet.errors import DataError, UsageError, in_short
from masksam_nnunet.files import read_json

from ..export.description import fault

ENDINGS = (".mha", ".nii.gz", ".nii", ".tif", ".tiff", ".nrrd", ".png", ".bmp")
"""Endings of image files, in upper or lower case."""


class OutputError(UsageError):
    """The output or the scratch folder is not writable, or full."""


class ContainerOptions(BaseModel):
    """What ``container.json`` may hold.

    Attributes:
        channels: slugs of the input sockets, in the order of the model's channels; empty if there is one only.
        output: the output socket's folder below ``images``.
        folds: those to use; all if empty.
        mirroring: mirror windows where the model allows it.
        step_size: step between windows, as a share of the patch.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    channels: list[str] = []
    output: Annotated[str, Field(pattern=r"^(images/)?[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "segmentation"
    folds: list[str] = []
    mirroring: bool = True
    step_size: Annotated[float, Field(gt=0, le=1)] = 0.5

    @classmethod
    def read(cls, model: Path, given: Mapping[str, Any] | None = None) -> ContainerOptions:
        """Read container.json in the folder ``model``, if there is one; ``given`` options override it."""
        file = model / "container.json"
        try:
            content = read_json(file) if file.is_file() else {}
            own = {name: value for name, value in (given or {}).items() if value is not None}
            return cls.model_validate({**content, **own})
        except ValidationError as error:
            raise UsageError(f"an option, or {file}: {fault(error)}") from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} is not a JSON object of options: {error}") from error


class _Socket(BaseModel):
    slug: str
    relative_path: str
    super_kind: str | None = None


class _Input(BaseModel):
    socket: _Socket = Field(validation_alias=AliasChoices("socket", "interface"))


@dataclass(frozen=True)
class Job:
    """One case: its images in the order of the model's channels, and the file to write."""

    channels: tuple[Path, ...]
    target: Path


def find_jobs(source: Path, out: Path, options: ContainerOptions, channels: Sequence[str]) -> list[Job]:
    """The cases of the input folder, sorted.

    ``source`` holds ``inputs.json``, ``images/SLUG/...``, or images themselves; looked for in this order. Targets are
    ``images/SLUG/NAME.mha`` in ``out``, or for images themselves of the same name.

    Raises:
        DataError: there is none, or they do not fit the model's ``channels`` or ``inputs.json``.
    """
    if not source.is_dir():
        raise DataError(f"--input {source} is not a folder; mount it: --volume DIR:/input:ro")
    listed, there = source / "inputs.json", [path for path in _entries(source / "images") if path.is_dir()]
    folders = _listed_folders(source, listed) if listed.is_file() else {path.name: path for path in there}
    if not folders:
        return _flat(source, out, len(channels))
    if missing := [slug for slug in options.channels if slug not in folders]:
        raise DataError(f"--channels names {', '.join(missing)}, but the input has {', '.join(folders)}")
    # Without names, the order of several sockets is unknown; one file may hold all channels.
    slugs = list(dict.fromkeys(options.channels)) or list(folders)
    if len(slugs) != 1 and (len(slugs) != len(channels) or not options.channels):
        raise DataError(f"order the sockets {', '.join(folders)} as the model's {', '.join(channels)} with --channels")
    chosen = [folders[slug] for slug in slugs]
    target = out / "images" / options.output.removeprefix("images/")
    jobs = [Job(files, target / f"{stem(files[0])}.mha") for files in _matched(chosen)]
    if len({job.target for job in jobs}) < len(jobs):
        raise DataError(f"{chosen[0]} holds files that differ in their endings only: give each case its own name")
    return jobs


def stem(file: Path) -> str:
    """The name without the image format's ending."""
    return file.name.removesuffix(ending(file))


def ending(file: Path) -> str:
    """The image format's ending, as in the name; empty if it is none of :data:`ENDINGS`."""
    found = next((end for end in ENDINGS if file.name.lower().endswith(end)), "")
    return file.name[len(file.name) - len(found) :]


def _listed_folders(source: Path, file: Path) -> dict[str, Path]:
    """The image inputs of ``inputs.json``: slug and place."""
    try:
        sockets = [entry.socket for entry in TypeAdapter(list[_Input]).validate_json(file.read_bytes())]
    except (ValidationError, OSError) as error:
        raise DataError(f"{file} is not a list of sockets as the platform writes it: {in_short(error)}") from error
    folders = {
        socket.slug: source / socket.relative_path
        for socket in sockets
        if (socket.super_kind or socket.relative_path.split("/")[0]).lower() in ("image", "images")
    }
    for slug, path in folders.items():
        if not path.exists() or not path.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{file}: relative_path of {slug}, {path}, does not exist in {source}")
    if not folders:
        raise DataError(f"{file} lists no image: add an image socket to the interface")
    return folders


def _matched(folders: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files of each case: one from each folder, by name where there are several."""
    files = [[path] if path.is_file() else _images(path) for path in folders]
    for folder, found in zip(folders, files, strict=True):
        if not found:
            raise DataError(f"{folder} holds no image, but {_names(folder)}")
    if all(len(found) == 1 for found in files):
        return [tuple(found[0] for found in files)]
    named = [{stem(path): path for path in found} for found in files]
    for folder, cases in zip(folders, named, strict=True):
        if odd := sorted(cases.keys() ^ named[0].keys()):
            raise DataError(f"only one of {folders[0]} and {folder} holds the cases {', '.join(odd[:5])}")
    return [tuple(cases[stem(path)] for cases in named) for path in files[0]]


def _flat(source: Path, out: Path, channels: int) -> list[Job]:
    files = _images(source)
    if not files:
        raise DataError(f"--input {source} has no inputs.json, images/SLUG/*.mha or images, but {_names(source)}")
    if channels == 1:  # a name such as amos_0001 ends in the case's number
        return [Job((file,), out / file.name) for file in files]
    cases: dict[str, list[Path]] = {}
    for file in files:
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem(file))
        if not numbered:
            raise DataError(f"{file} has no channel number, but the model has {channels}: name files CASE_0000.nii.gz")
        cases.setdefault(numbered[1], []).append(file)
    return [Job(tuple(found), out / f"{case}{ending(found[0])}") for case, found in sorted(cases.items())]


def _images(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_file() and ending(path)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): make it readable for all users") from error


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in _entries(folder)[:8]) or "nothing"
