"""What methods and ensembles are called in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .results import Method


def row_names(methods: Sequence[Method]) -> dict[Method, str]:
    """A short unique name for each: its trainer; and its plans where trainers repeat or plans are not nnU-Net's."""
    trainers = Counter(method.trainer for method in methods)
    return {
        method: method.trainer
        if trainers[method.trainer] == 1 and method.plans == "nnUNetPlans"
        else f"{method.trainer} ({method.plans})"
        for method in methods
    }


def joint_name(names: Sequence[str]) -> str:
    """The name of an ensemble of what is called so."""
    return " + ".join(names)


def postprocessed_name(name: str) -> str:
    return f"{name}, post-processed"
