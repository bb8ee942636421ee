"""Methods: a trainer, its plans and a configuration, named as on the command line, with baselines by short names."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value, variable
from masksam_nnunet.errors import UsageError
from masksam_nnunet.plans.architecture import BASE_PLANS
from masksam_nnunet.trainers import __all__ as our_trainers

BASELINES: Mapping[str, tuple[str, str]] = {
    "nnunet": ("nnUNetTrainer", BASE_PLANS),
    "resenc-m": ("nnUNetTrainer", "nnUNetResEncUNetMPlans"),
    "resenc-l": ("nnUNetTrainer", "nnUNetResEncUNetLPlans"),
    "resenc-xl": ("nnUNetTrainer", "nnUNetResEncUNetXLPlans"),
    # nnU-Net's documentation trains Primus on its default plans; it takes only the patch and the batch from them.
    "primus-s": ("nnUNet_Primus_S_Trainer", BASE_PLANS),
    "primus-b": ("nnUNet_Primus_B_Trainer", BASE_PLANS),
    "primus-m": ("nnUNet_Primus_M_Trainer", BASE_PLANS),
    "primus-l": ("nnUNet_Primus_L_Trainer", BASE_PLANS),
}
"""Trainer and plans of each baseline, by its name on the command line."""


@dataclass(frozen=True, order=True)
class ModelName:
    """A trainer, plans and a configuration, by nnU-Net's names."""

    trainer: str
    plans: str
    configuration: str

    @property
    def key(self) -> str:
        """The name of its folder in nnUNet_results."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"


def parse_methods(
    trainers: Sequence[str], plans: Sequence[str], configuration: str, option: str = "--trainers"
) -> tuple[ModelName, ...]:
    """Read the methods that a command line names with ``option``.

    Args:
        trainers: class names as nnU-Net finds them, ``TRAINER@PLANS``, or names of :data:`BASELINES`.
        plans: none, one for all trainers without plans of their own, or one for each trainer.
        configuration: nnU-Net's, such as ``3d_fullres``.
        option: for error messages.

    Raises:
        UsageError: unknown trainers, numbers that do not match, plans named twice, the same method twice.
    """
    if not trainers:
        raise UsageError(f"{option}: name at least one, for example {option} nnUNetTrainer MaskSAMTrainer")
    if len(plans) not in (0, 1, len(trainers)):
        raise UsageError(f"--plans: {len(plans)} names for {len(trainers)} trainers; give one for all or one for each")
    each = len(plans) == len(trainers) and len(plans) > 1
    methods: list[ModelName] = []
    for number, text in enumerate(trainers):
        trainer, own = _split(text, option)
        given = plans[number] if each else plans[0] if plans else None
        if own is not None and each and given != own:
            raise UsageError(f"{option} {text} has the plans {own}, but --plans gives it {given}: leave one out")
        find_trainer(trainer, option)
        method = ModelName(trainer, own or given or BASE_PLANS, configuration)
        if method in methods:
            raise UsageError(f"{option}: {trainer} with {method.plans} is named twice; leave one out")
        methods.append(method)
    return tuple(methods)


def parse_members(texts: Sequence[str], plans: str, configuration: str) -> list[ModelName]:
    """Read the models that ``--ensemble`` names, ``METHOD[:CONFIGURATION]``.

    ``plans`` and ``configuration``, which may be empty, are of those that name none (``-p``, ``-c``).

    Raises:
        UsageError: fewer than two, one twice, no configuration, an unknown trainer.
    """
    members: list[ModelName] = []
    for text in texts:
        name, colon, own = text.partition(":")
        if not (own or configuration) or (colon and not own):
            raise UsageError(
                f"--ensemble {text}: no configuration; write TRAINER[@PLANS]:CONFIGURATION, or give one for all with -c"
            )
        (method,) = parse_methods([name], [plans], own or configuration, "--ensemble")
        if method in members:
            raise UsageError(f"--ensemble {text}: {method.key} is named twice; leave one out")
        members.append(method)
    if len(members) < 2:
        raise UsageError(f"--ensemble {' '.join(texts)}: name two models or more, or predict with -tr, -p and -c")
    return members


def _split(text: str, option: str) -> tuple[str, str | None]:
    """Split ``TRAINER[@PLANS]`` or a baseline's name into trainer and plans."""
    name, at, plans = text.partition("@")
    if at and not (name and plans):
        raise UsageError(f"{option} {text!r}: write TRAINER@PLANS, for example nnUNetTrainer@nnUNetPlans")
    if name in BASELINES:
        trainer, its_plans = BASELINES[name]
        return trainer, plans or its_plans
    return name, plans or None


def find_trainer(name: str, option: str = "--trainers") -> type[Any]:
    """Find a trainer class as nnU-Net does, with MaskSAM's trainers among the candidates.

    Raises:
        UsageError: there is no such trainer.
    """
    return _find_trainer(name, ext_trainer_value(os.environ.get(EXT_TRAINER)), option)


@cache
def _find_trainer(name: str, folders: str, option: str) -> type[Any]:
    try:
        with variable(EXT_TRAINER, folders), contextlib.redirect_stdout(io.StringIO()):  # it prints where it looks
            found: type[Any] = recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        near = difflib.get_close_matches(name, [*BASELINES, "nnUNetTrainer", *our_trainers], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"baselines are {', '.join(BASELINES)}."
        raise UsageError(
            f"{option} {name}: nnU-Net finds no such trainer ({error}); {hint} Your own are found in the folders of "
            f"{EXT_TRAINER}"
        ) from error
    return found


def has_budget(method: ModelName) -> bool:
    """Whether its trainer stops after ``--minutes`` or ``--iterations``."""
    return method.trainer.endswith("_budget")
