"""What each challenge accepts: one JSON file per challenge beside this module, and the user's own rules over it."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import read_json

CHALLENGES = ("acdc", "amos", "synapse", "msd")
ENDING = ".nii.gz"
_LARGEST = {"uint8": 255, "int16": 32767, "uint16": 65535, "int32": 2**31 - 1, "float32": 2**24}

_Labels = dict[str, Annotated[StrictInt, Field(ge=0)]]
_Counts = Annotated[tuple[Annotated[StrictInt, Field(gt=0)], ...], Field(min_length=1)]
_Expected = Annotated[dict[str, Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1)]


class TaskRules(BaseModel):
    """The rules of one task; those that are set replace the challenge's. See :class:`Rules`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: re.Pattern[str]
    labels: _Labels
    counts: _Counts | None = None
    expected: _Expected | None = None
    left_out: tuple[str, ...] = ()


class Rules(BaseModel):
    """What a challenge, or one task of it, accepts.

    Attributes:
        file_name: format string of a file's name; its fields are the named groups of ``case``, and ``case``, ``task``
            and ``phase`` (ED or ES).
        folder: format string of the folder in the archive, "" for none; its only field is ``task``.
        dtype: NumPy's name of the voxels' type.
        labels: the challenge's label values by name, background included.
        also_called: other names of a label.
        all_labels: whether the model must know all labels.
        case: regular expression that nnU-Net's case names match as a whole.
        counts: accepted numbers of files, None for any.
        expected: values of each field of ``file_name``, whose combinations are the complete list of files; None if
            the list is unknown.
        left_out: cases that are not submitted although they have an image.
        tasks: the rules of each task, for a challenge that has tasks.
        all_tasks: whether an archive must hold all tasks.
        task: the task that these rules are for, "" for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_name: str = Field(pattern=r"^[^/\\]*\.nii\.gz$")
    folder: str = Field(pattern=r"^([^./\\][^/\\]*(/[^./\\][^/\\]*)*)?$")
    dtype: Literal["uint8", "int16", "uint16", "int32", "float32"]
    labels: _Labels = {}
    also_called: dict[str, tuple[str, ...]] = {}
    all_labels: StrictBool = True
    case: re.Pattern[str] = re.compile("")
    counts: _Counts | None = None
    expected: _Expected | None = None
    left_out: tuple[str, ...] = ()
    tasks: dict[str, TaskRules] = {}
    all_tasks: StrictBool = False
    task: str = ""

    def of_task(self, task: str) -> Rules:
        """The rules of one of ``tasks``."""
        own = self.tasks[task]
        return self.model_copy(update={"task": task} | {name: getattr(own, name) for name in own.model_fields_set})

    def match(self, case: str) -> dict[str, str] | None:
        """The named groups of a case's name; None if no case of the challenge is named so."""
        found = self.case.fullmatch(case)
        return {name: value or "" for name, value in found.groupdict().items()} if found else None

    @property
    def needs_phase(self) -> bool:
        """Whether file names tell end-diastole from end-systole."""
        return "phase" in _fields(self.file_name)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for part in [self.of_task(task) for task in self.tasks] or [self]:
            of_task = {"task"} if part.task else set()
            used, known = _fields(part.file_name), {*part.case.groupindex, "case", "phase"} | of_task
            numbers = part.labels.values()
            if not used <= known:
                raise ValueError(f"file_name has the fields {sorted(used)}, case gives only {sorted(known)}")
            if not _fields(part.folder) <= of_task:
                raise ValueError(f"folder {part.folder!r} may have only the field task of a challenge with tasks")
            if part.expected is not None and set(part.expected) != used:
                raise ValueError(f"expected lists {sorted(part.expected)}, file_name has the fields {sorted(used)}")
            if part.labels.get("background") != 0 or len(set(numbers)) < max(len(numbers), 2):
                raise ValueError(f"labels {part.labels} must be background as 0 and other, different numbers")
            if max(numbers) > _LARGEST[part.dtype]:
                raise ValueError(f"labels {part.labels} do not fit into dtype {part.dtype}")
        return self


class UnconfirmedRule(NamedTuple):
    """A rule that no publication of the challenge states."""

    name: str
    value: Any
    source: str


class ChallengeRules(NamedTuple):
    """A challenge's rules: its title, what users should know, those in use, and those of them that are unconfirmed."""

    title: str
    notes: tuple[str, ...]
    rules: Rules
    unconfirmed: tuple[UnconfirmedRule, ...]


def load_rules(challenge: str, override: Path | None = None) -> ChallengeRules:
    """Read the rules of one of ``CHALLENGES``; those in a user's file ``{"folder": "results", ...}`` take their place.

    Tasks in ``override`` are merged by task and rule; every other rule is replaced as a whole.

    Raises:
        UsageError: ``override`` cannot be read, or holds an unknown rule or a wrong value.
    """
    content = read_json(Path(str(files(__package__) / f"{challenge}.json")))
    values = {name: rule["value"] for name, rule in content["rules"].items()}
    try:
        own = {} if override is None else read_json(override)
        unknown = {"task", *([] if "tasks" in values else ["tasks", "all_tasks"])} & set(own)
        if unknown or not isinstance(own, dict):
            raise ValueError(f"{sorted(unknown) or own} are no rules of {challenge}")
        rules = Rules(**_merged(values, own))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, item['loc']))} {item['input']!r}: {item['msg']}" if item["loc"] else item["msg"]
            for item in error.errors()
        ]
        raise UsageError(f"--rules {override}: {'; '.join(wrong)}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f'--rules {override}: {error}; give a JSON file such as {{"folder": "results"}}') from error
    unconfirmed = tuple(
        UnconfirmedRule(name, rule["value"], rule["source"])
        for name, rule in content["rules"].items()
        if not rule["confirmed"] and name not in own
    )
    return ChallengeRules(content["title"], tuple(content["notes"]), rules, unconfirmed)


def _merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**values, **own}
    if isinstance(own.get("tasks"), dict):
        tasks = {
            name: values["tasks"].get(name, {}) | task if isinstance(task, dict) else task
            for name, task in own["tasks"].items()
        }
        merged["tasks"] = values["tasks"] | tasks
    return merged


def _fields(text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
