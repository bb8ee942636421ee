"""The paper's settings for three datasets, as data: ``presets/NAME.json``, each value with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from masksam_nnunet.config import LossConfig
from masksam_nnunet.errors import DataError

PRESETS = ("acdc", "synapse", "amos")


@dataclass(frozen=True)
class Optimizer:
    """What a published training was optimised with: ``SGD`` with Nesterov's momentum, or ``AdamW`` with ``eps``."""

    name: str
    learning_rate: float
    weight_decay: float
    momentum: float | None
    eps: float | None
    gradient_clip: float
    warmup_iterations: int


@dataclass(frozen=True)
class Preset:
    """A published setting.

    Attributes:
        name: as ``--preset`` takes it.
        backbone: SAM's encoder.
        patch_size: (D, H, W).
        batch_size: B.
        upsample: u.
        num_queries: N.
        foreground_classes: numbers of foreground labels for which it was published.
        trainer: the trainer class that carries optimizer and epochs.
        epochs: of 250 iterations.
        optimizer: see :class:`Optimizer`.
        loss: weights and points.
        dice: the paper's mean Dice, in per cent.
        notes: where this project's meaning of a number is not the released code's.
        sources: where each value comes from.
    """

    name: str
    backbone: str
    patch_size: tuple[int, int, int]
    batch_size: int
    upsample: int
    num_queries: int
    foreground_classes: tuple[int, ...]
    trainer: str
    epochs: int
    optimizer: Optimizer
    loss: LossConfig
    dice: float
    notes: tuple[str, ...]
    sources: dict[str, str]

    def check_labels(self, foreground: int, regions: bool, channels: int) -> None:
        """Refuse a dataset that the setting was not published for.

        Raises:
            DataError: naming what does not fit.
        """
        wanted = " or ".join(map(str, self.foreground_classes))
        if regions or foreground not in self.foreground_classes:
            found = f"{foreground} overlapping regions" if regions else f"{foreground} foreground labels"
            raise DataError(
                f"--preset {self.name} was published for {wanted} foreground labels, this dataset has {found}; "
                "plan it without --preset"
            )
        if channels != 1:
            raise DataError(
                f"--preset {self.name} was published for one image channel, this dataset has {channels}; "
                "plan it without --preset"
            )


@cache
def load_preset(name: str) -> Preset:
    """Read a preset of the package.

    Raises:
        DataError: for a name that is none of :data:`PRESETS`.
    """
    if name not in PRESETS:
        raise DataError(f"--preset {name!r} is not known: choose one of {', '.join(PRESETS)}")
    text = (files("masksam_nnunet.plans") / "presets" / f"{name}.json").read_text(encoding="utf-8")
    data = json.loads(text)
    values, sources = _values(data["setting"], "")
    optimizer = Optimizer(**{k.removeprefix("optimizer."): v for k, v in values.items() if k.startswith("optimizer.")})
    loss = LossConfig(**{k.removeprefix("loss."): v for k, v in values.items() if k.startswith("loss.")})
    return Preset(
        name=name,
        backbone=values["backbone"],
        patch_size=tuple(values["patch_size"]),
        batch_size=values["batch_size"],
        upsample=values["upsample"],
        num_queries=values["num_queries"],
        foreground_classes=tuple(values["foreground_classes"]),
        trainer=data["trainer"],
        epochs=values["epochs"],
        optimizer=optimizer,
        loss=loss,
        dice=values["dice"],
        notes=tuple(data["notes"]),
        sources=sources,
    )


def _values(data: dict[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Flatten nested objects whose leaves are {"value": ..., "source": ...}."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, entry in data.items():
        if set(entry) == {"value", "source"}:
            values[prefix + key], sources[prefix + key] = entry["value"], entry["source"]
        else:
            inner, origin = _values(entry, f"{prefix}{key}.")
            values |= inner
            sources |= origin
    return values, sources
