"""The JSON files of a portable model: what they may say, and which files there are.

A portable model is a folder of these files, and of no others that count::

    model.json              the description, with the SHA-256 and size of each of the others
    plans.json              nnU-Net's, as they were in the results folder, byte by byte
    dataset.json            likewise
    shared.safetensors      the tensors that all folds agree on, bit by bit; only where there are any
    fold_0.safetensors ...  the other tensors, for each fold; fold_all likewise
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from masksam_nnunet.errors import ModelError

MODEL, PLANS, DATASET, SHARED = "model.json", "plans.json", "dataset.json", "shared.safetensors"
LARGEST_JSON = 2**26
"""Bytes; nnU-Net's plans take some kilobytes."""

_FOLD = r"all|0|[1-9][0-9]{0,2}"
Name = Annotated[str, Field(pattern=r"\A(?!.*__)[A-Za-z0-9]([A-Za-z0-9_.-]{0,78}[A-Za-z0-9])?\Z")]
Fold = Annotated[str, Field(pattern=rf"\A({_FOLD})\Z")]


class FileEntry(BaseModel):
    """A file as it was written."""

    model_config = ConfigDict(strict=True, frozen=True)

    sha256: str
    bytes: int


class Description(BaseModel):
    """What ``model.json`` says.

    Attributes:
        trainer: the class that builds the network, looked up among those installed.
        folds: ``"0"``, ``"1"``, ... or ``"all"``, each once.
        epochs: of training, for each fold.
        mirroring_axes: over which predictions may be mirrored; None for no mirroring.
        files: all files of the model but ``model.json``.
        versions: of the packages that wrote it, for people.
        sam: hash, name, licence and known training data of the SAM file that the weights come from, for people.
    """

    model_config = ConfigDict(strict=True, frozen=True, regex_engine="python-re")

    format: Literal["masksam-portable-model"] = "masksam-portable-model"
    format_version: Literal[1] = 1
    dataset: Annotated[str, Field(pattern=r"\A(?!.*__)Dataset[0-9]{3,9}_[\w.+()-][\w .+()-]{0,100}\Z")]
    plans: Name
    configuration: Name
    trainer: Annotated[str, Field(pattern=r"\A(?!.*__)[A-Za-z][A-Za-z0-9_]{0,79}\Z")]
    folds: Annotated[tuple[Fold, ...], Field(min_length=1, max_length=100)]
    epochs: dict[str, int]
    mirroring_axes: Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(max_length=3)] | None
    files: dict[str, FileEntry]
    versions: dict[str, str]
    sam: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Description:
        for name, values in (("folds", self.folds), ("mirroring_axes", self.mirroring_axes or ())):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} repeats a value: {values}")
        needed = {PLANS, DATASET, *map(fold_file, self.folds)}
        if missing := sorted(needed - self.files.keys()):
            raise ValueError(f"files lacks {missing[:8]}")
        if more := sorted(self.files.keys() - needed - {SHARED}):
            raise ValueError(f"files should not have {more[:8]}")
        return self


def fold_file(fold: str) -> str:
    """The file of a fold's own tensors."""
    return f"fold_{fold}.safetensors"


def is_file_of_a_model(name: str) -> bool:
    """Whether a portable model may hold a file of this name."""
    fixed = (MODEL, PLANS, DATASET, SHARED)
    return name in fixed or re.fullmatch(rf"fold_({_FOLD})\.safetensors", name) is not None


def is_portable(folder: Path) -> bool:
    """Whether ``folder`` is meant to be a portable model, sound or not. Raises nothing."""
    try:
        content = read_foreign_json(folder / MODEL)
    except ModelError:
        return False
    return isinstance(content, dict) and content.get("format") == Description.model_fields["format"].default


def read_description(folder: Path) -> Description:
    """The description of the model in ``folder``; raise ModelError if it is missing, unreadable or not one."""
    try:
        return Description.model_validate_json(_read(folder / MODEL))
    except ValidationError as error:
        raise ModelError(f"{folder / MODEL} does not describe a portable model: {fault(error)}") from error


def read_foreign_json(file: Path) -> Any:
    """Read JSON of unknown origin; raise ModelError if it is unreadable, too large, or not JSON."""
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise ModelError(f"{file} is not JSON ({error}); fetch the model again") from error


def fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong: where, the value, and why."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place} = {first['input']!r:.80}: {first['msg']}" if place else first["msg"]


def verify(folder: Path, description: Description, names: Iterable[str]) -> None:
    """Compare files with the sizes and hashes in the description; raise ModelError for one that differs."""
    for file in (folder / name for name in names):
        if not file.is_file() or file_entry(file) != description.files[file.name]:
            raise ModelError(f"{file} is missing, or not what {MODEL} describes by its hash; fetch the model again")


def file_entry(file: Path) -> FileEntry:
    """A file's hash and size; raise ModelError if it cannot be read."""
    with _opened(file) as stream:
        return FileEntry(sha256=hashlib.file_digest(stream, "sha256").hexdigest(), bytes=stream.tell())


def _opened(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise ModelError(f"cannot read {file} of a portable model: {error.strerror or error}") from error


def _read(file: Path) -> bytes:
    with _opened(file) as stream:
        text = stream.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ModelError(f"{file} has more than {LARGEST_JSON} bytes: fetch the model again")
    return text
