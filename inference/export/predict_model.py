"""A portable model as one that ``masksam predict`` predicts with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..predictor import MaskSAMPredictor
from .description import Description
from .load import load_portable, read_plans


@dataclass(frozen=True)
class PortablePredictModel:
    """Folds of a portable model; see ``inference.predict_models.Model``. All that is given has been checked.

    Attributes:
        folder: the model's.
        wanted: numbers or "all"; all that there are if not given.
    """

    folder: Path
    wanted: Sequence[int | str] | None = None

    @property
    def name(self) -> str:
        return self._description.model_folder

    @property
    def configuration(self) -> str:
        return self._description.configuration

    @property
    def plans(self) -> dict[str, Any]:
        plans: dict[str, Any] = self._content[1].plans
        return plans

    @property
    def dataset_json(self) -> dict[str, Any]:
        return self._content[2]

    def describe(self) -> dict[str, Any]:
        """With the hashes of the weights: folders are moved and renamed."""
        files = {name: entry.sha256 for name, entry in self._description.files.items()}
        return {"model": self.name, "folds": list(self._content[3]), "portable": files}

    def check(self) -> None:
        """Raises:
        PortableError: all but the weights has been read, and something is missing, damaged or not safe.
        """
        _ = self._content

    def load(self, predictor: MaskSAMPredictor) -> None:
        """Read and check the weights, and have the predictor predict with them.

        Raises:
            PortableError: they are missing, damaged or do not fit.
        """
        load_portable(predictor, self.folder, self.wanted)

    @property
    def _description(self) -> Description:
        return self._content[0]

    @functools.cached_property
    def _content(self) -> tuple[Description, PlansManager, dict[str, Any], tuple[str, ...]]:
        return read_plans(self.folder, self.wanted)
