"""The paper's settings for three datasets, read from ``presets/NAME.json``, each value with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import TypeAdapter

from masksam_nnunet.config import LossConfig
from masksam_nnunet.errors import DataError
from masksam_nnunet.method import Recipe

PRESETS = ("acdc", "synapse", "amos")


@dataclass(frozen=True)
class Preset:
    """A published setting.

    Attributes:
        patch_size: (D, H, W).
        foreground_classes: the numbers of foreground labels that it was published for.
        trainer: the trainer class with its optimizer and epochs.
        epochs: of 250 iterations.
        dice: the paper's mean Dice, in per cent.
        notes: where a number means something else here than in the released code.
        sources: where each value comes from, by dotted name.
    """

    name: str
    backbone: str
    patch_size: tuple[int, int, int]
    batch_size: int
    resolution: int
    num_queries: int
    matching: Literal["slice", "volume"]
    foreground_classes: tuple[int, ...]
    trainer: str
    epochs: int
    recipe: Recipe
    loss: LossConfig
    dice: float
    notes: tuple[str, ...]
    sources: dict[str, str]

    def check_labels(self, foreground: int, regions: bool, channels: int) -> None:
        """Raise a DataError for a dataset that the setting was not published for."""
        if regions or channels != 1 or foreground not in self.foreground_classes:
            raise DataError(
                f"--preset {self.name} was published for {' or '.join(map(str, self.foreground_classes))} foreground "
                f"labels and one channel; this dataset has {foreground} {'regions' if regions else 'labels'}; its "
                f"channels: {channels}. Plan it without --preset"
            )


@cache
def load_preset(name: str) -> Preset:
    """The preset of a name in :data:`PRESETS`."""
    data = json.loads((files("masksam_nnunet.plans") / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    sources: dict[str, str] = {}
    values = _values(data["setting"], "", sources) | {"name": name, "sources": sources}
    return TypeAdapter(Preset).validate_python(values | {key: data[key] for key in ("trainer", "notes")})


def _values(data: dict[str, Any], prefix: str, sources: dict[str, str]) -> dict[str, Any]:
    """The values of nested objects whose leaves are {"value": ..., "source": ...}; fills ``sources`` by dotted name."""
    values = {}
    for key, entry in data.items():
        if set(entry) == {"value", "source"}:
            values[key], sources[prefix + key] = entry["value"], entry["source"]
        else:
            values[key] = _values(entry, f"{prefix}{key}.", sources)
    return values
