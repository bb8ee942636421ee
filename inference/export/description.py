"""What ``model.json`` says of a portable model: a frozen dataclass that is the same thing as plain JSON.

A portable model is a folder of these files, and of no others that count::

    model.json              this description, with the SHA-256 and size of each of the others
    plans.json              nnU-Net's, as they were in the results folder, byte by byte
    dataset.json            likewise
    shared.safetensors      the tensors that all folds agree on, bit by bit; only where there are any
    fold_0.safetensors ...  the other tensors, for each fold; fold_all likewise
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import PortableError

FORMAT = "masksam-portable-model"
VERSION = 1
MODEL, PLANS, DATASET, SHARED = "model.json", "plans.json", "dataset.json", "shared.safetensors"
LARGEST_JSON = 2**26
"""Bytes; nnU-Net's plans take some kilobytes."""
MOST_FOLDS = 100

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLD = re.compile(r"all|0|[1-9][0-9]{0,2}")
_NAME = re.compile(r"(?!.*__)[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,78}[A-Za-z0-9])?")
_TRAINER = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]{0,79}")
_DATASET = re.compile(r"(?!.*__)Dataset[0-9]{3}_[\w.+()-][\w .+()-]{0,100}")


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Description:
    """A portable model.

    Attributes:
        dataset: the dataset's name, ``DatasetXXX_Name``.
        plans: name of the plans.
        configuration: such as ``3d_fullres``.
        trainer: the class that builds the network; it is looked up among those installed, never loaded from the model.
        network: the configuration's ``architecture``, as the plans hold it.
        folds: ``"0"``, ``"1"``, ... or ``"all"``, each once.
        epochs: how many each fold was trained.
        mirroring_axes: over which predictions may be mirrored; None: none.
        same_as: names of tensors that are others under a second name, as nnU-Net's U-Nets have them, and those names.
        files: all files of the model but ``model.json``.
        versions: of the packages that wrote it, for people.
    """

    dataset: str
    plans: str
    configuration: str
    trainer: str
    network: Mapping[str, Any]
    folds: tuple[str, ...]
    epochs: Mapping[str, int]
    mirroring_axes: tuple[int, ...] | None
    same_as: Mapping[str, str]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]

    @property
    def model_folder(self) -> str:
        """The name of nnU-Net's folder for it."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, with the format's name and version."""
        return {"format": FORMAT, "format_version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Any) -> Description:
        """Read what :meth:`to_json` wrote, trusting nothing.

        Raises:
            PortableError: another format or version, an unknown or missing key, a value that cannot be.
        """
        _check(isinstance(content, dict) and content.get("format") == FORMAT, f'it has no "format": "{FORMAT}"')
        version = content.get("format_version")
        _check(
            version == VERSION and not isinstance(version, bool),
            f"format_version = {version!r:.40}, but this masksam-nnunet reads {VERSION}: install the one that wrote it",
        )
        wanted = {"format", "format_version", *(field.name for field in dataclasses.fields(cls))}
        odd = sorted(f"{key:.40}" for key in wanted.symmetric_difference(content))
        _check(not odd, f"missing or unknown: {', '.join(odd[:8])}")
        for key, pattern in (
            ("dataset", _DATASET), ("plans", _NAME), ("configuration", _NAME), ("trainer", _TRAINER)
        ):  # fmt: skip
            _check(_is_text(content[key], pattern), f"{key} = {content[key]!r:.80} is not such a name")
        _check(isinstance(content["network"], dict), "network is not an object")
        folds = _folds(content["folds"])
        epochs = _mapping(content, "epochs", lambda key, value: key in folds and _is_count(value))
        axes = content["mirroring_axes"]
        _check(
            axes is None or (_is_list(axes, 3, _is_count) and len(set(axes)) == len(axes) and max(axes, default=0) < 3),
            f"mirroring_axes = {axes!r:.80} is not a list of axes from 0 to 2",
        )
        same_as = _mapping(content, "same_as", lambda key, value: isinstance(value, str) and key != value)
        _check(not set(same_as.values()) & set(same_as), "same_as refers to names that it explains")
        versions = _mapping(content, "versions", lambda key, value: isinstance(value, str))
        return cls(
            dataset=content["dataset"],
            plans=content["plans"],
            configuration=content["configuration"],
            trainer=content["trainer"],
            network=content["network"],
            folds=folds,
            epochs=epochs,
            mirroring_axes=None if axes is None else tuple(axes),
            same_as=same_as,
            files=_files(content["files"], folds),
            versions=versions,
        )


def fold_file(fold: str) -> str:
    """The file of a fold's own tensors."""
    return f"fold_{fold}.safetensors"


def is_file_of_a_model(name: str) -> bool:
    """Whether a portable model may hold a file of this name."""
    fold = name.removeprefix("fold_").removesuffix(".safetensors")
    return name in (MODEL, PLANS, DATASET, SHARED) or (name == fold_file(fold) and _FOLD.fullmatch(fold) is not None)


def read_description(folder: Path) -> Description:
    """The description of the model in ``folder``.

    Raises:
        PortableError: it is missing, unreadable or not one.
    """
    file = folder / MODEL
    if folder.is_file():
        raise PortableError(f"{folder} is a file: masksam import {folder} --unpack FOLDER makes a folder of it")
    if not file.is_file():
        raise PortableError(
            f"{folder} is no portable model: it has no {MODEL}; masksam export --format safetensors writes one"
        )
    try:
        return Description.from_json(read_foreign_json(file))
    except PortableError as error:
        raise PortableError(f"{file} is not a portable model's description: {error}") from error


def read_foreign_json(file: Path) -> Any:
    """JSON from elsewhere: of bounded size, whatever it holds.

    Raises:
        PortableError: unreadable, too large, or not JSON.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST_JSON + 1)
    except OSError as error:
        raise PortableError(f"cannot read {file}: {error.strerror or error}") from error
    if len(text) > LARGEST_JSON:
        raise PortableError(f"{file} is larger than {LARGEST_JSON} bytes: no such file of a model is")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
        raise PortableError(f"{file} is not JSON ({error}); fetch the model again") from error


def verify(folder: Path, description: Description, names: Iterable[str]) -> None:
    """Compare files with the sizes and hashes that the description gives.

    Raises:
        PortableError: a file is missing, or is not the one that was written.
    """
    for name in names:
        file, expected = folder / name, description.files[name]
        if file.is_symlink() or not file.is_file():
            raise PortableError(f"{file} is missing, or no regular file; fetch the model again")
        found = entry(file)
        if found != expected:
            raise PortableError(
                f"{file} is not the file that was written with the model: {found.bytes} bytes with SHA-256 "
                f"{found.sha256}, {MODEL} says {expected.bytes} with {expected.sha256}; fetch the model again"
            )


def entry(file: Path) -> FileEntry:
    """A file's hash and size.

    Raises:
        PortableError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return FileEntry(hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell())
    except OSError as error:
        raise PortableError(f"cannot read {file}: {error.strerror or error}") from error


def _folds(value: Any) -> tuple[str, ...]:
    valid = _is_list(value, MOST_FOLDS, lambda fold: _is_text(fold, _FOLD)) and value and len(set(value)) == len(value)
    _check(bool(valid), f'folds = {value!r:.80} is not a list of "0", "1", ... or "all"')
    return tuple(value)


def _files(value: Any, folds: Sequence[str]) -> dict[str, FileEntry]:
    _check(isinstance(value, dict), "files is not an object")
    needed = {PLANS, DATASET, *map(fold_file, folds)}
    odd = sorted(f"{name:.40}" for name in needed.symmetric_difference(value) - {SHARED})
    _check(not odd, f"files are missing or unknown: {', '.join(odd[:8])}")
    result = {}
    for name, described in value.items():
        _check(
            isinstance(described, dict)
            and set(described) == {"sha256", "bytes"}
            and _is_text(described["sha256"], _SHA256)
            and _is_count(described["bytes"]),
            f"{name}: not a SHA-256 and a number of bytes",
        )
        result[name] = FileEntry(**described)
    return result


def _mapping(content: Mapping[str, Any], key: str, valid: Callable[[str, Any], bool]) -> dict[str, Any]:
    value = content[key]
    _check(
        isinstance(value, dict) and all(valid(name, item) for name, item in value.items()),
        f"{key} = {value!r:.80} is not what it should be",
    )
    return dict(value)


def _is_list(value: Any, most: int, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(valid, value))


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise PortableError(message)
