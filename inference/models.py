"""Models to predict with: where they come from, and whether they can be averaged."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.errors import PredictError
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.methods import Method

from .cases import channel_names
from .model_folders import find_models
from .predictor import MaskSAMPredictor


class Model(Protocol):
    """A trained model, whatever keeps its weights. Nothing of these is read before it is asked for, nor checked."""

    @property
    def name(self) -> str:
        """For messages, and for a folder of its predictions."""

    @property
    def configuration(self) -> str:
        """nnU-Net's."""

    @property
    def plans(self) -> dict[str, Any]:
        """Content of plans.json."""

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Content of dataset.json."""

    def describe(self) -> dict[str, Any]:
        """What tells this model from others, as JSON; predictions are continued by an equal one only."""

    def check(self) -> None:
        """Raises:
        PredictError: something lacks without which it cannot predict.
        """

    def load(self, predictor: MaskSAMPredictor) -> None:
        """Have the predictor predict with it."""


@dataclass(frozen=True)
class TrainedModel:
    """Folds in nnUNet_results.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: numbers or "all"; what their networks return is averaged.
        checkpoint: the file in each fold's folder.
    """

    folder: Path
    folds: tuple[int | str, ...]
    checkpoint: str = "checkpoint_final.pth"

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def configuration(self) -> str:
        return self.name.rpartition("__")[2]

    @functools.cached_property
    def plans(self) -> dict[str, Any]:
        return self._read("plans.json")

    @functools.cached_property
    def dataset_json(self) -> dict[str, Any]:
        return self._read("dataset.json")

    def describe(self) -> dict[str, Any]:
        return {"model": self.name, "folds": list(self.folds), "checkpoint": self.checkpoint}

    def check(self) -> None:
        trained = sorted(
            file.parent.name.removeprefix("fold_") for file in self.folder.glob(f"fold_*/{self.checkpoint}")
        )
        missing = [str(fold) for fold in self.folds if str(fold) not in trained]
        if missing:
            raise PredictError(
                f"-f {' '.join(map(str, self.folds))}: {self.name} has no {self.checkpoint} of fold "
                f"{' '.join(missing)}; name those that have: -f {' '.join(trained) or '(none)'}, another file "
                "(-chk), or train them"
            )
        if self.configuration not in self.plans.get("configurations", {}):
            raise PredictError(f"{self.folder / 'plans.json'} has no configuration {self.configuration}; restore it")

        for fold in self.folds:
            _check_checkpoint(self.folder / f"fold_{fold}" / self.checkpoint)

    def load(self, predictor: MaskSAMPredictor) -> None:
        predictor.initialize_from_trained_model_folder(str(self.folder), self.folds, self.checkpoint)

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise PredictError(f"{file} cannot be read ({error}); it belongs to the model: restore it") from error
        if not isinstance(content, dict):
            raise PredictError(f"{file} holds no JSON object; it belongs to the model: restore it")
        return content


def trained_models(
    dataset: str, methods: Sequence[Method], folds: Sequence[int | str], checkpoint: str
) -> list[TrainedModel]:
    """Models in nnUNet_results.

    Args:
        dataset: number or name.
        methods: trainer, plans and configuration of each.
        folds: of all.
        checkpoint: of all.

    Raises:
        ModelError: there is no such dataset or model.
    """
    folders = [find_models(dataset, m.trainer, m.plans, [m.configuration])[1][0] for m in methods]
    return [TrainedModel(folder, tuple(folds), checkpoint) for folder in folders]


def reader_of(model: Model) -> Any:
    """nnU-Net's reader and writer of its images."""
    return PlansManager(model.plans).image_reader_writer_class()


def previous_stage(model: Model) -> str | None:
    """The configuration whose label maps a cascade takes; None for others."""
    stage: str | None = PlansManager(model.plans).get_configuration(model.configuration).previous_stage_name
    return stage


def check_averaging(models: Sequence[Model]) -> None:
    """Refuse models whose probabilities mean different things.

    Raises:
        PredictError: naming the models, what differs, and both values.
    """
    first = models[0]
    for other in models[1:]:
        for what, remedy in _MUST_AGREE.items():
            one, two = _facts(first)[what], _facts(other)[what]
            if one != two:
                raise PredictError(
                    f"--ensemble: {first.name} and {other.name} differ in {what} ({one} and {two}) and cannot be "
                    f"averaged; {remedy}"
                )


_MUST_AGREE = {
    "the dataset": "name models that were trained on the same one",
    "labels": "train one of them again with the other one's dataset.json",
    "the order of regions": "train one of them again with the other one's dataset.json",
    "channels": "train one of them again with the other one's dataset.json",
    "the file ending": "train one of them again with the other one's dataset.json",
    "the reader of images": "plan one of them again with the same reader (overwrite_image_reader_writer)",
}


def _facts(model: Model) -> Mapping[str, object]:
    plans, description = model.plans, model.dataset_json
    return {
        "the dataset": plans.get("dataset_name"),
        "labels": description["labels"],
        "the order of regions": description.get("regions_class_order"),
        "channels": channel_names(description),
        "the file ending": description["file_ending"],
        "the reader of images": plans.get("image_reader_writer"),
    }


def _check_checkpoint(file: Path) -> None:
    """A zip file that was cut off has lost its end, which lists what is in it."""
    with file.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"  # else one of torch's old format, which shows when it is loaded
    if file.stat().st_size == 0 or (is_zip and not zipfile.is_zipfile(file)):
        raise PredictError(
            f"{file} is cut off: copy it anew, go on with the training (--c), or name another file (-chk)"
        )
