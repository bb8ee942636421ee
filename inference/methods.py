"""Which methods to compare: ``--trainers`` and ``--plans``, and baselines by name."""

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

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.plans.training_inputs import DEFAULT_PLANS
from masksam_nnunet.trainers import __all__ as our_trainers

BASELINES: Mapping[str, tuple[str, str]] = {
    "nnunet": ("nnUNetTrainer", DEFAULT_PLANS),
    "resenc-m": ("nnUNetTrainer", "nnUNetResEncUNetMPlans"),
    "resenc-l": ("nnUNetTrainer", "nnUNetResEncUNetLPlans"),
    "resenc-xl": ("nnUNetTrainer", "nnUNetResEncUNetXLPlans"),
    # nnU-Net's documentation trains Primus on its default plans; of these it takes the patch and the batch only.
    "primus-s": ("nnUNet_Primus_S_Trainer", DEFAULT_PLANS),
    "primus-b": ("nnUNet_Primus_B_Trainer", DEFAULT_PLANS),
    "primus-m": ("nnUNet_Primus_M_Trainer", DEFAULT_PLANS),
    "primus-l": ("nnUNet_Primus_L_Trainer", DEFAULT_PLANS),
}
"""Trainer and plans of each, by the name that the command line takes."""


@dataclass(frozen=True, order=True)
class Method:
    """What is trained: nnU-Net's names."""

    trainer: str
    plans: str
    configuration: str

    @property
    def key(self) -> str:
        """The name of its folder in nnUNet_results."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"


def parse_methods(
    trainers: Sequence[str], plans: Sequence[str], configuration: str, option: str = "--trainers"
) -> tuple[Method, ...]:
    """The methods that the command line names.

    Args:
        trainers: class names as nnU-Net finds them, ``TRAINER@PLANS``, or names of :data:`BASELINES`.
        plans: none, one for all trainers that name none of their own, or one for each trainer.
        configuration: nnU-Net's, such as ``3d_fullres``.
        option: what the user named them by, for the messages.

    Raises:
        BenchmarkError: unknown trainers, numbers that do not match, plans named twice, the same method twice.
    """
    if not trainers:
        raise BenchmarkError(f"{option}: name at least one, for example {option} nnUNetTrainer MaskSAMTrainer")
    if len(plans) not in (0, 1, len(trainers)):
        raise BenchmarkError(
            f"--plans holds {len(plans)} names for {len(trainers)} trainers: give one for all, or one for each"
        )
    each = len(plans) == len(trainers) and len(plans) > 1
    methods = []
    for number, text in enumerate(trainers):
        trainer, own = _split(text, option)
        given = plans[number] if each else plans[0] if plans else None
        if own is not None and each and given != own:
            raise BenchmarkError(f"{option} {text} has the plans {own}, but --plans gives it {given}: leave one out")
        find_trainer(trainer, option)
        method = Method(trainer, own or given or DEFAULT_PLANS, configuration)
        if method in methods:
            raise BenchmarkError(
                f"{option}: {method.trainer} with {method.plans} is named twice; leave one out, or give it other "
                "plans: TRAINER@PLANS"
            )
        methods.append(method)
    return tuple(methods)


def _split(text: str, option: str) -> tuple[str, str | None]:
    """The trainer, and the plans that it names itself."""
    name, at, plans = text.partition("@")
    if at and not (name and plans):
        raise BenchmarkError(f"{option} {text!r}: write TRAINER@PLANS, for example nnUNetTrainer@nnUNetPlans")
    if name in BASELINES:
        trainer, its_plans = BASELINES[name]
        return trainer, plans or its_plans
    return name, plans or None


def find_trainer(name: str, option: str = "--trainers") -> type[Any]:
    """The class that nnU-Net finds for this name, with MaskSAM's trainers among those it looks at.

    Raises:
        BenchmarkError: if it finds none.
    """
    return _find_trainer(name, ext_trainer_value(os.environ.get(EXT_TRAINER)), option)


@cache
def _find_trainer(name: str, folders: str, option: str) -> type[Any]:
    before = os.environ.get(EXT_TRAINER)
    os.environ[EXT_TRAINER] = folders
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells where it looks
            found: type[Any] = recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        known = [*BASELINES, "nnUNetTrainer", *our_trainers]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"baselines by name are {', '.join(BASELINES)};"
        raise BenchmarkError(
            f"{option} {name}: nnU-Net finds no such trainer ({error}); {hint} Trainers of your own are found in the "
            f"folders that {EXT_TRAINER} names"
        ) from error
    finally:
        if before is None:
            del os.environ[EXT_TRAINER]
        else:
            os.environ[EXT_TRAINER] = before
    return found


def has_budget(method: Method) -> bool:
    """Whether its trainer stops by the clock, after ``--minutes``."""
    return method.trainer.endswith("_budget")
