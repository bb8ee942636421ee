"""How often a training saves its latest checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import SAVE_EVERY

_PART = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>epochs?|min(utes?)?)")


@dataclass(frozen=True)
class SaveInterval:
    """Both count where both are given: whichever comes first.

    Attributes:
        epochs: at the end of every so many.
        minutes: after so many since the last one, within an epoch too.
    """

    epochs: int | None = None
    minutes: float | None = None

    @classmethod
    def chosen(cls, default: SaveInterval) -> SaveInterval:
        """What ``MASKSAM_SAVE_EVERY`` says, such as ``10epochs``, ``15min`` or ``10epochs,15min``.

        Raises:
            ConfigError: it says something else.
        """
        text = os.environ.get(SAVE_EVERY, "").strip()
        if not text:
            return default
        values: dict[str, float] = {}
        for part in text.split(","):
            found = _PART.fullmatch(part.strip())
            number = float(found["number"]) if found else 0.0
            unit = "epochs" if found and found["unit"].startswith("epoch") else "minutes"
            if number <= 0 or unit in values or (unit == "epochs" and not number.is_integer()):
                raise ConfigError(
                    f"{SAVE_EVERY} = {text!r} is not allowed: give epochs, minutes, or both with a comma, such as "
                    "10epochs, 15min or 10epochs,15min"
                )
            values[unit] = number
        epochs = values.get("epochs")
        return cls(None if epochs is None else int(epochs), values.get("minutes"))
