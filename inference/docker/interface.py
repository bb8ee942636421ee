"""What lies in the input folder, and what is wanted in the output folder.

Grand Challenge's interface, read in its own source (comic/grand-challenge.org, 2026: ``components/serializers.py``,
``components/backends/base.py``, ``docs/algorithms.rst``): ``inputs.json`` lists the inputs, each with ``socket`` (and,
for older algorithms, the same as ``interface``): ``slug``, ``relative_path``, ``super_kind``. An image lies in the
folder ``relative_path``. Of each image output's folder the platform imports MHA and TIFF files, and refuses the job if
that does not give exactly one image. It asks for other files only by sockets of their own, so none are written here.

AMOS 2022's test phase: files in the input folder, predictions under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import read_json

ENDINGS = (".mha", ".nii.gz", ".nii", ".tif", ".tiff", ".nrrd", ".png", ".bmp")
"""Of image files, in any case."""
CONTAINER_JSON = "container.json"
"""In the model folder: ``{"channels": ["t2-mri", "adc-mri"], "output": "prostate-segmentation"}``; all optional."""


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

    @field_validator("channels")
    @classmethod
    def _different(cls, channels: list[str]) -> list[str]:
        if len(set(channels)) < len(channels):
            raise ValueError("slugs must differ")
        return channels

    @classmethod
    def read(cls, model: Path, given: Mapping[str, Any] | None = None) -> ContainerOptions:
        """Read container.json in the folder ``model``, if there is one; ``given`` options override it.

        Raises:
            UsageError: the file or an option is not what it should be.
        """
        file = model / CONTAINER_JSON
        try:
            content = read_json(file) if file.is_file() else {}
            return cls.model_validate({**content, **(given or {})})
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise UsageError(f"{place} = {fault['input']!r}, an option or in {file}: {fault['msg']}") from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} is not a JSON object of options: {error}") from error


@dataclass(frozen=True)
class Job:
    """One case.

    Attributes:
        channels: its images, in the order of the model's channels.
        target: the file to write.
    """

    channels: tuple[Path, ...]
    target: Path


def find_jobs(source: Path, out: Path, options: ContainerOptions, channels: Sequence[str]) -> list[Job]:
    """The cases of the input folder, sorted.

    Args:
        source: with ``inputs.json``, with ``images/SLUG/...``, or with images themselves; looked for in this order.
        out: the output folder. Targets are ``images/SLUG/NAME.mha`` in it, or for images themselves of the same name.
        options: the algorithm's sockets.
        channels: names of the model's.

    Raises:
        DataError: there is none, they do not fit the model, or they are not what ``inputs.json`` says.
    """
    if not source.is_dir():
        raise DataError(f"--input {source} is not a folder; mount it: --volume DIR:/input:ro")
    listed = source / "inputs.json"
    if listed.is_file():
        folders = _listed_folders(source, listed)
    else:
        folders = {path.name: path for path in _entries(source / "images") if path.is_dir()}
    if not folders:
        return _flat(source, out, len(channels))
    chosen = _in_order(folders, options, channels)
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
    folders = {}
    try:
        for entry in read_json(file):
            socket = entry.get("socket") or entry["interface"]
            slug, place, kind = str(socket["slug"]), str(socket["relative_path"]), socket.get("super_kind")
            if str(kind).lower() == "image" if kind else place.startswith("images/"):
                folders[slug] = source / place
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not a list of sockets as the platform writes it: {error!r:.200}") from error
    for slug, path in folders.items():
        if not path.exists() or not path.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{file}: relative_path of {slug}, {path}, does not exist in {source}")
    if not folders:
        raise DataError(f"{file} lists no image: add an image socket to the interface")
    return folders


def _in_order(folders: Mapping[str, Path], options: ContainerOptions, channels: Sequence[str]) -> list[Path]:
    there = ", ".join(folders)
    if missing := [slug for slug in options.channels if slug not in folders]:
        raise DataError(f"--channels names {', '.join(missing)}, but the input has {there}")
    # Without names, the order of several sockets is unknown; one file may hold all channels.
    chosen = options.channels or (list(folders) if len(folders) == 1 else [])
    if len(chosen) not in (1, len(channels)):
        raise DataError(
            f"the input has the sockets {there}, the model the channels {', '.join(channels)}: name the sockets in the "
            f"channels' order with --channels or in {CONTAINER_JSON}"
        )
    return [folders[slug] for slug in chosen]


def _matched(folders: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files of each case: one from each folder, by name where there are several."""
    files = [[path] if path.is_file() else _images(path) for path in folders]
    if empty := [folder for folder, found in zip(folders, files, strict=True) if not found]:
        raise DataError(f"{empty[0]} holds no image: {_content(empty[0])}")
    if all(len(found) == 1 for found in files):
        return [tuple(found[0] for found in files)]
    named = [{stem(path): path for path in found} for found in files]
    for folder, cases in zip(folders, named, strict=True):
        if odd := sorted(cases.keys() ^ named[0].keys()):
            raise DataError(f"{folders[0]} and {folder} do not hold the same cases: only one has {', '.join(odd[:5])}")
    return [tuple(cases[stem(path)] for cases in named) for path in files[0]]


def _flat(source: Path, out: Path, channels: int) -> list[Job]:
    files = _images(source)
    if not files:
        raise DataError(f"--input {source} has no inputs.json, no images/SLUG/*.mha and no images: {_content(source)}")
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
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): make it readable for all users") from error


def _content(folder: Path) -> str:
    return f"it holds {', '.join(path.name for path in _entries(folder)[:8]) or 'nothing'}"
