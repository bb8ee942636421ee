"""Print what ``masksam plan`` decided and why, and what comes next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from masksam_nnunet.environment import EXT_TRAINER, trainer_folder

from .architecture import DECISIONS
from .planner import CASCADE, LOW
from .presets import Preset
from .raw_data import number_of

_OWN_TRAINERS = {"tiny": "MaskSAMTrainer_tiny"}  # results are to say that it is not SAM


@dataclass(frozen=True)
class Planned:
    """What was planned.

    Attributes:
        plans: their content.
        file: where they are.
        configurations: those planned now; the file may hold others, from before.
        unprocessed: those of them whose data are not preprocessed yet.
    """

    plans: dict[str, Any]
    file: Path
    configurations: list[str]
    unprocessed: list[str]


def tell(console: Console, planned: Planned, recipe: Preset | None, warnings: Sequence[str]) -> None:
    """Print it."""

    def say(text: str, **style: Any) -> None:  # paths and commands are to be copied whole
        console.print(text, soft_wrap=True, highlight=False, markup=False, **style)

    plans, number = planned.plans, number_of(planned.plans["dataset_name"])
    decided = {name: plans[DECISIONS][name]["decided"] for name in planned.configurations if name != CASCADE}
    for name, rows in decided.items():
        title = f"{plans['dataset_name']}, {plans['plans_name']}, {name}"
        table = Table(title=title, title_justify="left")
        for column in ("", "value", "why"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(row["what"], str(row["value"]), row["why"])
        console.print(table, markup=False)
    if CASCADE in planned.configurations:
        say(f"{CASCADE}: the network of 3d_fullres, with the labels of {LOW} as more channels")
    if recipe is not None:
        say(f"The published setting ({recipe.name}, {recipe.dice} mean Dice in the paper) means here:")
        for note in recipe.notes:
            say(f"  - {note}")
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")
    say(f"Plans: {planned.file}")
    steps = []
    if planned.unprocessed:
        wanted = " ".join(planned.unprocessed)
        steps.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans['plans_name']} -c {wanted} -np 4")
    else:
        say("No preprocessing is needed: the data preprocessed for nnU-Net are used.")
    backbones = {name: next(r["value"] for r in rows if r["what"] == "backbone") for name, rows in decided.items()}
    steps += [f"masksam weights {name}" for name in sorted(set(backbones.values()) - {"tiny"})]
    if str(trainer_folder()) not in os.environ.get(EXT_TRAINER, "").split(os.pathsep):
        steps.append('eval "$(masksam env)"')
    first = "3d_fullres" if "3d_fullres" in decided else next(iter(decided))
    trainer = recipe.trainer if recipe else _OWN_TRAINERS.get(backbones[first], "MaskSAMTrainer")
    steps.append(f"nnUNetv2_train {number} {first} 0 -p {plans['plans_name']} -tr {trainer}")
    say("Next:")
    for step in steps:
        say(f"  {step}")
