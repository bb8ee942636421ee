"""What lies in the input folder, and what is wanted in the output folder.

Grand Challenge's interface, read in its own source (comic/grand-challenge.org, 2026: ``components/serializers.py``,
``components/backends/base.py``, ``docs/algorithms.rst``): ``inputs.json`` lists the inputs, each with ``socket`` (and,
for older algorithms, the same as ``interface``): ``slug``, ``relative_path``, ``super_kind``. An image lies in the
folder ``relative_path``. Of each image output's folder the platform imports MHA and TIFF files, and refuses the job if
that does not give exactly one image. Any other file is asked for only by a socket of its own: ``results.json`` by
algorithms that declare it; an ``outputs.json`` by none. So none is written here.

AMOS 2022's test phase: files in the input folder, predictions under the same names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, OptionError

ENDINGS = (".mha", ".nii.gz", ".nii", ".tif", ".tiff", ".nrrd", ".png", ".bmp")
"""Of image files, in any case."""
CONTAINER_JSON = "container.json"
"""In the model folder: ``{"channels": ["t2-mri", "adc-mri"], "output": "prostate-segmentation"}``, both optional."""
DEFAULT_OUTPUT = "segmentation"


@dataclass(frozen=True)
class Job:
    """One case.

    Attributes:
        channels: its images, in the order of the model's channels.
        target: the file to write.
    """

    channels: tuple[Path, ...]
    target: Path


@dataclass(frozen=True)
class Sockets:
    """How the platform's sockets relate to the model.

    Attributes:
        channels: slugs of the input sockets, in the order of the model's channels; empty if there is one only.
        output: the output socket's folder below ``images``.
    """

    channels: tuple[str, ...] = ()
    output: str = DEFAULT_OUTPUT

    @classmethod
    def read(cls, model: Path, channels: Sequence[str] = (), output: str = "") -> Sockets:
        """From container.json in the folder ``model``, where there is one; what is given counts more.

        Raises:
            OptionError: the file or a value is not what it should be.
        """
        file = model / CONTAINER_JSON
        content: Any = {}
        if file.is_file():
            content = _read_json(file, OptionError)
        if not isinstance(content, dict) or content.keys() - {"channels", "output"}:
            raise OptionError(f'{file}: write {{"channels": [SLUG, ...], "output": SLUG}}, with one of them or both')
        named = channels or content.get("channels", [])
        if isinstance(named, str) or not all(isinstance(slug, str) for slug in named) or len(set(named)) < len(named):
            raise OptionError(f"{file}: channels = {named!r} is not a list of different slugs")
        output = output or content.get("output", DEFAULT_OUTPUT)
        parts = str(output).removeprefix("images/")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", parts):
            raise OptionError(f"output = {output!r}: give the slug of the output socket, a folder below OUTPUT/images")
        return cls(tuple(named), parts)


def find_jobs(source: Path, out: Path, sockets: Sockets, channels: Sequence[str]) -> list[Job]:
    """The cases of the input folder, sorted.

    Args:
        source: with ``inputs.json``, with ``images/SLUG/...``, or with images themselves; looked for in this order.
        out: the output folder. Targets are ``images/SLUG/NAME.mha`` in it, or for images themselves of the same name.
        sockets: of the algorithm.
        channels: names of the model's.

    Raises:
        InputError: there is none, they do not fit the model, or they are not what ``inputs.json`` says.
    """
    if not source.is_dir():
        raise InputError(f"--input {source}: there is no such folder; mount it: --volume DIR:/input:ro")
    listed = source / "inputs.json"
    if listed.is_file():
        folders = _listed_folders(source, listed)
    else:
        folders = {path.name: path for path in _entries(source / "images") if path.is_dir()}
    if not folders:
        return _flat(source, out, len(channels))
    chosen = _in_order(folders, sockets, channels)
    target = out / "images" / sockets.output
    jobs = [Job(files, target / f"{stem(files[0])}.mha") for files in _matched(chosen)]
    if twice := {job.target for job in jobs if [other.target for other in jobs].count(job.target) > 1}:
        raise InputError(f"{chosen[0]} holds several files named {min(twice).stem}: give each case a name of its own")
    return jobs


def stem(file: Path) -> str:
    """The name without the image format's ending."""
    return file.name[: -len(ending(file))]


def ending(file: Path) -> str:
    """The image format's ending, as in the name; empty if it is none of :data:`ENDINGS`."""
    found = next((end for end in ENDINGS if file.name.lower().endswith(end)), "")
    return file.name[len(file.name) - len(found) :]


def _listed_folders(source: Path, file: Path) -> dict[str, Path]:
    """The image inputs of ``inputs.json``: slug and place."""
    content = _read_json(file, InputError)
    if not isinstance(content, list):
        raise InputError(f"{file} is not a list of inputs, as the platform writes it")
    folders = {}
    for entry in content:
        socket = entry.get("socket") or entry.get("interface") if isinstance(entry, dict) else None
        socket = socket if isinstance(socket, dict) else {}
        slug, place = socket.get("slug"), socket.get("relative_path")
        if not isinstance(slug, str) or not isinstance(place, str):
            raise InputError(f"{file}: {str(entry)[:200]} has no socket with slug and relative_path")
        kind = socket.get("super_kind")
        if not (str(kind).lower() == "image" if kind else place.startswith("images/")):
            continue  # numbers, texts
        path = source / place
        if not path.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{file}: relative_path = {place!r} of {slug} is not below {source}")
        if not path.exists():
            raise InputError(f"{file} lists {slug} in {place}, but {path} does not exist")
        folders[slug] = path
    if not folders:
        raise InputError(
            f"{file} lists no image, but {len(content)} other inputs: add an image socket to the interface"
        )
    return folders


def _in_order(folders: Mapping[str, Path], sockets: Sockets, channels: Sequence[str]) -> list[Path]:
    there = ", ".join(folders)
    wanted = f"the model was trained on {len(channels)} channels ({', '.join(channels)})"
    remedy = f"name them in the order of the model's channels, with --channels or in the model's {CONTAINER_JSON}"
    if sockets.channels:
        if missing := [slug for slug in sockets.channels if slug not in folders]:
            raise InputError(f"no image of {', '.join(missing)}; there are: {there}. Other sockets? Then {remedy}")
        folders = {slug: folders[slug] for slug in sockets.channels}
    elif len(folders) > 1:
        raise InputError(f"images of {len(folders)} sockets ({there}) and {wanted}: {remedy}")
    if len(folders) not in (1, len(channels)):
        raise InputError(f"images of {len(folders)} sockets ({', '.join(folders)}), but {wanted}: {remedy}")
    return list(folders.values())


def _matched(folders: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files of each case: one from each folder, by name where there are several."""
    files = [[path] if path.is_file() else _images(path) for path in folders]
    for folder, found in zip(folders, files, strict=True):
        if not found:
            raise InputError(f"{folder} holds no image: {_what_is_there(folder)}")
    if all(len(found) == 1 for found in files):
        return [tuple(found[0] for found in files)]
    named = [{stem(path): path for path in found} for found in files]
    for folder, cases in zip(folders[1:], named[1:], strict=True):
        if odd := sorted(cases.keys() ^ named[0].keys()):
            raise InputError(
                f"{folders[0]} and {folder} do not hold the same cases: {', '.join(odd[:5])} in one of them only; give "
                "the channels of a case the same file name"
            )
    return [tuple(cases[stem(path)] for cases in named) for path in files[0]]


def _flat(source: Path, out: Path, channels: int) -> list[Job]:
    files = _images(source)
    if not files:
        raise InputError(
            f"--input {source}: no inputs.json, no images/SLUG/*.mha and no images: {_what_is_there(source)}"
        )
    if channels == 1:  # a name such as amos_0001 ends in the case's number
        return [Job((file,), out / file.name) for file in files]
    cases: dict[str, list[Path]] = {}
    for file in files:
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem(file))
        if not numbered:
            raise InputError(f"{file} has no channel number, but the model has {channels}: name files CASE_0000.nii.gz")
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
        raise InputError(f"{folder} cannot be read ({error.strerror}): let the container's user read it") from error


def _what_is_there(folder: Path) -> str:
    names = [path.name for path in _entries(folder)]
    return f"it holds {', '.join(names[:8])}" if names else "it is empty"


def _read_json(file: Path, kind: type[InputError] | type[OptionError]) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{file} cannot be read as JSON: {error}") from error
