"""A model's label values as a challenge's, matched by name, never by number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from masksam_nnunet.errors import SubmissionError

from .rules import Rules


@dataclass(frozen=True)
class LabelTable:
    """A model's labels in a challenge.

    Attributes:
        values: the challenge's value for each value that a prediction may hold.
        defects: names of the model or of the challenge without a partner.
        notes: labels of the challenge that stay empty.
    """

    values: Mapping[int, int]
    defects: tuple[str, ...]
    notes: tuple[str, ...]


def model_labels(dataset_json: Any, source: str) -> dict[str, int]:
    """The labels of a dataset.json, by name; without the ignore label, which no prediction holds.

    Args:
        dataset_json: its content.
        source: the file, for messages.

    Raises:
        SubmissionError: there are none, or they are regions, whose values have no name of their own.
    """
    labels = dataset_json.get("labels") if isinstance(dataset_json, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise SubmissionError(
            f'{source} has no "labels"; they are matched by name: give the model\'s dataset.json with --dataset-json'
        )
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise SubmissionError(
            f"{source} has regions ({', '.join(regions)}), so the values in predictions have no names; give with "
            '--dataset-json a file {"labels": {"background": 0, NAME: VALUE, ...}} of the values that they hold'
        )
    wrong = {name: value for name, value in labels.items() if not isinstance(value, int) or isinstance(value, bool)}
    if wrong:
        raise SubmissionError(
            f"{source}: labels must be whole numbers, not {wrong!r}; correct it or give --dataset-json"
        )
    return {name: value for name, value in labels.items() if name != "ignore"}


def match_labels(model: Mapping[str, int], rules: Rules) -> LabelTable:
    """Find for each of a model's labels the challenge's of the same name.

    Case, spaces, underscores and the like do not count; ``rules.also_called`` has further names.
    """
    known = {_plain(name): name for name in rules.labels}
    for name, others in rules.also_called.items():
        if name in rules.labels:
            for other in others:
                known.setdefault(_plain(other), name)
    values: dict[int, int] = {}
    takers: dict[str, list[str]] = {}
    defects = []
    for name, value in model.items():
        target = known.get(_plain(name))
        if target is None:
            names = ", ".join(rules.labels)
            defects.append(
                f"label {name!r} ({value}) in dataset.json is none of the challenge's ({names}); if it is one by "
                'another name, say so with --rules: {"also_called": {CHALLENGE\'S NAME: [NAME, ...]}}'
            )
            continue
        values[value] = rules.labels[target]
        takers.setdefault(target, []).append(name)
    defects += [
        f"labels {' and '.join(map(repr, names))} in dataset.json are both {target!r} of the challenge"
        for target, names in takers.items()
        if len(names) > 1
    ]
    lacking = ", ".join(f"{name} ({value})" for name, value in rules.labels.items() if name not in takers)
    notes: tuple[str, ...] = ()
    if lacking and rules.all_labels:
        defects.append(f"dataset.json lacks labels of the challenge: {lacking}; use a model that was trained on them")
    elif lacking:
        notes = (f"the model does not know {lacking}: they stay empty, which scores 0 where they are in the truth",)
    return LabelTable(values, tuple(defects), notes)


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))
