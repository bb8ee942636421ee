"""What each challenge accepts: one JSON file per challenge beside this module, and the user's own rules over it."""

from __future__ import annotations

import re
import string
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import read_json

from ..export.description import fault

CHALLENGES = ("acdc", "amos", "synapse", "msd")
ENDING = ".nii.gz"
_LARGEST = {"uint8": 255, "int16": 32767, "uint16": 65535, "int32": 2**31 - 1, "float32": 2**24}


class Rules(BaseModel):
    """What a challenge, or one task of it, accepts.

    Attributes:
        task: the task that these rules are for, "" for a challenge without tasks.
        case: regular expression that nnU-Net's case names match as a whole.
        file_name: format string of a file's name; its fields are the named groups of ``case``, and ``case``, ``task``
            and ``phase`` (ED or ES).
        folder: format string of the folder in the archive, "" for none; its only field is ``task``.
        dtype: NumPy's name of the voxels' type.
        labels: the challenge's label values by name, background included.
        also_called: other names of a label.
        all_labels: whether the model must know all labels.
        counts: accepted numbers of files, None for any.
        expected: values of each field of ``file_name``, whose combinations are the complete list of files; None if
            the list is unknown.
        left_out: cases that are not submitted although they have an image.
        optional: regular expression of cases that may all be missing, None for none.
        all_tasks: whether an archive must hold all tasks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    case: re.Pattern[str]
    file_name: str = Field(pattern=r"^[^/\\]*\.nii\.gz$")
    folder: str = Field(pattern=r"^([^./\\][^/\\]*(/[^./\\][^/\\]*)*)?$")
    dtype: Literal["uint8", "int16", "uint16", "int32", "float32"]
    labels: dict[str, Annotated[StrictInt, Field(ge=0)]]
    also_called: dict[str, tuple[str, ...]] = {}
    all_labels: StrictBool = True
    counts: Annotated[tuple[Annotated[StrictInt, Field(gt=0)], ...], Field(min_length=1)] | None = None
    expected: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] | None = None
    left_out: tuple[str, ...] = ()
    optional: re.Pattern[str] | None = None
    all_tasks: StrictBool = False

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
        of_task = {"task"} if self.task else set()
        used, known = _fields(self.file_name), {*self.case.groupindex, "case", "phase"} | of_task
        numbers = self.labels.values()
        if not used <= known:
            raise ValueError(f"file_name has the fields {sorted(used)}, case gives only {sorted(known)}")
        if not _fields(self.folder) <= of_task:
            raise ValueError(f"folder {self.folder!r} may have only the field task of a challenge with tasks")
        if self.expected is not None and set(self.expected) != used:
            raise ValueError(f"expected lists {sorted(self.expected)}, file_name has the fields {sorted(used)}")
        if self.labels.get("background") != 0 or len(set(numbers)) < max(len(numbers), 2):
            raise ValueError(f"labels {self.labels} must be background as 0 and other, different numbers")
        if max(numbers) > _LARGEST[self.dtype]:
            raise ValueError(f"labels {self.labels} do not fit into dtype {self.dtype}")
        return self


class UnconfirmedRule(NamedTuple):
    """A rule that no publication of the challenge states."""

    name: str
    value: Any
    source: str


class ChallengeRules(NamedTuple):
    """A challenge: what users should know, the rules of each task ("" where there are none), those unconfirmed."""

    title: str
    notes: tuple[str, ...]
    tasks: dict[str, Rules]
    unconfirmed: tuple[UnconfirmedRule, ...]
    of_test_set: bool
    """Whether it takes predictions of a dataset's imagesTs."""


def load_rules(challenge: str, override: Path | None = None) -> ChallengeRules:
    """Read the rules of one of ``CHALLENGES``; those in a user's file ``{"folder": "results", ...}`` take their place.

    Tasks in ``override`` are merged by task and rule; every other rule is replaced as a whole.

    Raises:
        UsageError: ``override`` cannot be read, or holds an unknown rule or a wrong value.
    """
    content = read_json(Path(str(files(__package__) / f"{challenge}.json")))
    common = {name: rule["value"] for name, rule in content["rules"].items()}
    tasks = common.pop("tasks", {"": {}})
    try:
        own = {} if override is None else dict(read_json(override))
        own_tasks = own.get("tasks", {}) if any(tasks) else {}
        known = Rules.model_fields.keys() - {"task"} | ({"tasks"} if any(tasks) else set())
        if unknown := own.keys() - known:
            raise ValueError(f"{sorted(unknown)} are no rules of {challenge}")
        common |= {name: rule for name, rule in own.items() if name != "tasks"}
        tasks |= {name: tasks.get(name, {}) | rules for name, rules in own_tasks.items()}
        checked = {name: _checked(name, common | rules) for name, rules in tasks.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f'--rules {override}: {error}; give a JSON file such as {{"folder": "results"}}') from error
    unconfirmed = tuple(
        UnconfirmedRule(name, rule["value"], rule["source"])
        for name, rule in content["rules"].items()
        if not rule["confirmed"] and name not in own
    )
    of_test_set = content.get("of_test_set", True)
    return ChallengeRules(content["title"], tuple(content["notes"]), checked, unconfirmed, of_test_set)


def _checked(task: str, values: dict[str, Any]) -> Rules:
    try:
        return Rules(**{**values, "task": task})
    except ValidationError as error:
        raise ValueError(f"{task} {fault(error)}".strip()) from error


def _fields(text: str) -> set[str]:
    """The names in a format string; ValueError where it is none."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
