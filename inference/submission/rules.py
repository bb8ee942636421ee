"""What each challenge accepts: a JSON file for each beside this module, and a user's own values over it."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import SubmissionError
from masksam_nnunet.files import read_json

CHALLENGES = ("acdc", "amos", "synapse", "msd")
ENDING = ".nii.gz"
_DTYPES = {"uint8": 255, "int16": 32767, "uint16": 65535, "int32": 2**31 - 1, "float32": 2**24}


@dataclass(frozen=True)
class Unconfirmed:
    """A rule that no publication of the challenge was found for."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Rules:
    """What one challenge, or one task of it, accepts.

    Attributes:
        title: the challenge and its phase.
        file_name: format string of a file's name, from the named groups of ``case`` and from ``case``, ``task`` and
            ``phase`` (ED or ES).
        folder: format string of the folder in the archive, "" for none; of ``task``.
        labels: the challenge's label values by name, background included.
        also_called: other names of a label.
        all_labels: predictions must be of a model that knows all labels.
        dtype: of the voxels, a NumPy name.
        case: regular expression that whole case names of nnU-Net match.
        counts: numbers of files that are accepted, None if any.
        expected: values of fields of ``file_name`` whose combinations are the complete list of files, None if unknown.
        left_out: cases that are not submitted though they have an image.
        tasks: for each task, its own ``case``, ``labels`` and, where there are, ``counts``, ``expected``, ``left_out``.
        all_tasks: an archive must hold all of them.
        task: the task that these are the rules of.
        notes: for the user.
        unconfirmed: rules in use that are not confirmed; a user's own are not among them.
    """

    title: str
    file_name: str
    folder: str
    dtype: str
    labels: Mapping[str, int] = field(default_factory=dict)
    also_called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    all_labels: bool = True
    case: str = ""
    counts: tuple[int, ...] | None = None
    expected: Mapping[str, tuple[str, ...]] | None = None
    left_out: tuple[str, ...] = ()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    all_tasks: bool = False
    task: str | None = None
    notes: tuple[str, ...] = ()
    unconfirmed: tuple[Unconfirmed, ...] = ()

    def of_task(self, task: str) -> Rules:
        """The rules of one task; ``task`` is a key of ``tasks``."""
        return replace(self, task=task, **self.tasks[task])

    @property
    def folder_name(self) -> str:
        """The folder in the archive, "" for none."""
        return self.folder.format(task=self.task)

    def match(self, case: str) -> dict[str, str] | None:
        """The named groups of a case's name, None for a name that no case of the challenge has."""
        found = re.fullmatch(self.case, case)
        return {name: value or "" for name, value in found.groupdict().items()} if found else None

    @property
    def needs_phase(self) -> bool:
        """File names tell end-diastole from end-systole."""
        return "phase" in _fields(self.file_name)


def load_rules(challenge: str, override: Path | None = None) -> Rules:
    """The rules of a challenge, with those of a user's file ``{"folder": "results", ...}`` in their place.

    In ``override``, tasks are merged by name and key, every other rule is replaced as a whole.

    Args:
        challenge: one of ``CHALLENGES``.
        override: a JSON file of some rules.

    Raises:
        SubmissionError: naming the file, each rule that is wrong there, its value and what it must be.
    """
    if challenge not in CHALLENGES:
        raise SubmissionError(f"there is no challenge {challenge!r}; there are {', '.join(CHALLENGES)}")
    content = read_json(Path(str(files(__package__) / f"{challenge}.json")))
    values = {name: rule["value"] for name, rule in content["rules"].items()}
    unconfirmed = [
        Unconfirmed(name, rule["value"], rule["source"])
        for name, rule in content["rules"].items()
        if not rule["confirmed"]
    ]
    if override is not None:
        own = _read_override(override, values)
        unconfirmed = [rule for rule in unconfirmed if rule.name not in own]
        merged_tasks = {
            name: values.get("tasks", {}).get(name, {}) | own.get("tasks", {}).get(name, {})
            for name in {**values.get("tasks", {}), **own.get("tasks", {})}
        }
        values |= own
        if merged_tasks:
            values["tasks"] = merged_tasks
    _require_whole(values, f"--rules {override}" if override else challenge)
    return Rules(
        title=content["title"], notes=tuple(content["notes"]), unconfirmed=tuple(unconfirmed), **_frozen(values)
    )


def _read_override(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        own = read_json(path)
    except (OSError, ValueError) as error:
        raise SubmissionError(
            f'--rules {path} cannot be read as JSON: {error}; give a file such as {{"folder": "results"}}'
        ) from error
    if not isinstance(own, dict):
        raise SubmissionError(f'--rules {path} holds {own!r}; give an object such as {{"folder": "results"}}')
    allowed = [name for name in _MUST_BE if name != "tasks" or "tasks" in known]
    wrong = [f"there is no rule {name!r}, there are {', '.join(allowed)}" for name in own if name not in allowed]
    wrong += _wrong_values({name: value for name, value in own.items() if name in allowed})
    if wrong:
        raise SubmissionError(f"--rules {path}: " + "; ".join(wrong))
    return own


def _wrong_values(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each of some rules."""
    wrong = []
    for name, value in values.items():
        accepted, text = _MUST_BE[name]
        if not accepted(value):
            wrong.append(f"{name!r} must be {text}, not {value!r}")
        elif name == "tasks":
            wrong += [f"{task!r}: {text}" for task, own in value.items() for text in _wrong_of_task(own)]
    return wrong


def _wrong_of_task(own: Mapping[str, Any]) -> list[str]:
    known = ", ".join(_OF_TASK)
    unknown = [f"there is no rule {name!r}, tasks have {known}" for name in own if name not in _OF_TASK]
    return unknown + _wrong_values({name: value for name, value in own.items() if name in _OF_TASK})


def _require_whole(values: Mapping[str, Any], source: str) -> None:
    """Rules that only fit together, or not."""
    wrong = []
    parts = values.get("tasks") or {"": {}}
    for task, own in parts.items():
        rules = {**values, **own}
        at = f"{task}: " if task else ""
        missing = [key for key in ("case", "labels") if not rules.get(key)]
        if missing:
            wrong.append(f"{at}there is no {' and no '.join(missing)}")
            continue
        groups = set(re.compile(rules["case"]).groupindex) | {"case", "phase", *(["task"] if task else [])}
        unknown = _fields(rules["file_name"]) - groups
        if unknown:
            wrong.append(
                f"{at}'file_name' {rules['file_name']!r} needs {', '.join(sorted(unknown))}, but 'case' "
                f"{rules['case']!r} gives only {', '.join(sorted(groups))}"
            )
        if _fields(values["folder"]) - ({"task"} if task else set()):
            wrong.append(f"{at}'folder' {values['folder']!r} may hold {'{task}' if task else 'no field'}")
        used, listed = _fields(rules["file_name"]), rules.get("expected")
        if listed and set(listed) != used:
            wrong.append(
                f"{at}'expected' lists {', '.join(listed)}, but 'file_name' {rules['file_name']!r} has "
                f'{", ".join(sorted(used)) or "no field"}; give both, or "expected": null'
            )
        highest = max(rules["labels"].values())
        if highest > _DTYPES[values["dtype"]]:
            wrong.append(f"{at}the label {highest} does not fit into 'dtype' {values['dtype']}")
    if wrong:
        raise SubmissionError(f"{source}: " + "; ".join(dict.fromkeys(wrong)))


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, also inside."""

    def freeze(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: freeze(item) for key, item in value.items()}
        return tuple(freeze(item) for item in value) if isinstance(value, list) else value

    return {name: freeze(value) for name, value in values.items()}


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def _is_format(value: Any) -> bool:
    try:
        return isinstance(value, str) and all(name.isidentifier() for name in _fields(value))
    except ValueError:
        return False


def _is_file_name(value: Any) -> bool:
    return _is_format(value) and value.endswith(ENDING) and "/" not in value and "\\" not in value


def _is_folder(value: Any) -> bool:
    """A relative folder with forward slashes, without .. in it."""
    return (
        _is_format(value)
        and "\\" not in value
        and (value == "" or all(part not in ("", ".", "..") for part in value.split("/")))
    )


def _is_labels(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("background") == 0
        and all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value.values())
        and len(set(value.values())) == len(value) > 1
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_name_lists(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_names(names) for names in value.values())


def _is_counts(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and bool(value) and all(isinstance(n, int) and type(n) is int and n > 0 for n in value)
    )


def _is_tasks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(task, dict) for task in value.values())


_OF_TASK = ("case", "labels", "counts", "expected", "left_out")
_MUST_BE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "case": (_is_regex, "a regular expression for nnU-Net's case names"),
    "file_name": (_is_file_name, f"a name ending in {ENDING}, with fields such as {{case}}"),
    "folder": (_is_folder, 'a folder such as "results", "" for none, without .. or leading /'),
    "labels": (_is_labels, '{"background": 0, NAME: NUMBER, ...} with different whole numbers'),
    "also_called": (_is_name_lists, "{NAME: [OTHER NAME, ...], ...}"),
    "all_labels": (lambda value: isinstance(value, bool), "true or false"),
    "dtype": (lambda value: isinstance(value, str) and value in _DTYPES, " or ".join(_DTYPES)),
    "counts": (_is_counts, "a list of whole numbers above 0, or null for any"),
    "expected": (
        lambda value: value is None or (_is_name_lists(value) and all(value.values()) and bool(value)),
        "{FIELD: [VALUE, ...], ...} for the fields of file_name, or null",
    ),
    "left_out": (_is_names, "a list of case names"),
    "all_tasks": (lambda value: isinstance(value, bool), "true or false"),
    "tasks": (_is_tasks, "{TASK: {RULE: VALUE, ...}, ...}"),
}
