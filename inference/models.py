"""Trained models: find them in nnUNet_results, check their files, load them into a predictor."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from masksam_nnunet.checkpoints import damage
from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.files import read_json
from masksam_nnunet.plans.raw_data import find_dataset

from .methods import ModelName


class Model(Protocol):
    """A trained model, whatever keeps its weights; its files are read when they are first needed.

    ``name`` is for messages and for a folder of its predictions, ``plans`` and ``dataset_json`` are files' contents.
    """

    @property
    def name(self) -> str: ...

    @property
    def configuration(self) -> str: ...

    @property
    def plans(self) -> dict[str, Any]: ...

    @property
    def dataset_json(self) -> dict[str, Any]: ...

    def describe(self) -> dict[str, Any]:
        """What identifies this model, as JSON; only an equal model may continue its predictions."""

    def check(self) -> None:
        """Raises:
        MaskSAMError: a file that prediction needs is missing or damaged.
        """

    def load(self, predictor: nnUNetPredictor) -> None:
        """Load the weights into the predictor."""


@dataclass(frozen=True)
class TrainedModel:
    """Folds in nnUNet_results.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: numbers or "all"; the outputs of their networks are averaged.
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
        saved = [round(file.stat().st_mtime) for file in self._files]  # a training that goes on makes another model
        return {"model": self.name, "folds": list(self.folds), "checkpoint": self.checkpoint, "saved": saved}

    def check(self) -> None:
        missing = [str(fold) for fold, file in zip(self.folds, self._files, strict=True) if not file.is_file()]
        if missing:
            found = sorted(self.folder.glob(f"fold_*/{self.checkpoint}"))
            trained = " ".join(file.parent.name.removeprefix("fold_") for file in found)
            raise ModelError(
                f"-f {' '.join(map(str, self.folds))}: {self.name} has no {self.checkpoint} of fold "
                f"{' '.join(missing)}, only of: {trained or 'none'}"
            )
        if self.configuration not in self.plans.get("configurations", {}):
            raise ModelError(f"{self.folder / 'plans.json'} has no configuration {self.configuration}; restore it")
        for file in self._files:
            if wrong := damage(file, thorough=False):
                raise ModelError(
                    f"{file} is cut off or damaged ({wrong}): copy it again, continue its training (--c), or name "
                    "another (-chk)"
                )

    def load(self, predictor: nnUNetPredictor) -> None:
        predictor.initialize_from_trained_model_folder(str(self.folder), self.folds, self.checkpoint)

    @property
    def _files(self) -> list[Path]:
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            return dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{file} cannot be read ({error}); it belongs to the model: restore it") from error


def find_models(
    dataset: str, trainer: str, plans: str, configurations: Sequence[str] | None = None
) -> tuple[Path, list[Path]]:
    """Find nnU-Net's results folder, and in it the folders of models, ``TRAINER__PLANS__CONFIGURATION``.

    ``dataset`` is a number or a name; all trained ``configurations`` are found if none are given.

    Raises:
        DataError: there is no such dataset in nnUNet_results.
        ModelError: there is no such model; the message lists the models that exist.
    """
    name = find_dataset(dataset, ("nnUNet_results",))
    results = Path(os.environ["nnUNet_results"])
    trained = {folder.name.split("__")[2]: folder for folder in (results / name).glob(f"{trainer}__{plans}__*")}
    missing = [wanted for wanted in configurations or () if wanted not in trained]
    if missing or not trained:
        others = sorted(folder.name for folder in (results / name).glob("*__*__*"))
        raise ModelError(
            f"{results / name} holds no model {' or '.join(f'{trainer}__{plans}__{c}' for c in missing or '*')}, only: "
            f"{', '.join(others) or 'none'}. Name another one (-tr, -p, -c), or train it"
        )
    return results, [trained[wanted] for wanted in configurations or sorted(trained)]


def trained_models(
    dataset: str, methods: Sequence[ModelName], folds: Sequence[int | str], checkpoint: str
) -> list[TrainedModel]:
    """Find one model for each method; ``folds`` and ``checkpoint`` are those of all.

    Raises:
        ModelError: there is no such dataset or model.
    """
    folders = [find_models(dataset, m.trainer, m.plans, [m.configuration])[1][0] for m in methods]
    return [TrainedModel(folder, tuple(folds), checkpoint) for folder in folders]


def parse_folds(texts: Sequence[str]) -> list[int | str]:
    """Read ``-f``: numbers, or "all"; the same one twice counts once.

    Raises:
        UsageError: any other word.
    """
    wrong = [text for text in texts if not (text == "all" or (text.isascii() and text.isdecimal()))]
    if wrong:
        raise UsageError(f"-f {wrong[0]}: give fold numbers, or all")
    return [text if text == "all" else int(text) for text in dict.fromkeys(texts)]


def previous_stage(model: Model) -> str | None:
    """The configuration whose label maps a cascade takes; None for others."""
    return PlansManager(model.plans).get_configuration(model.configuration).previous_stage_name


def network_to_predict(
    plans: PlansManager, configuration: str, dataset_json: Mapping[str, Any], trainer: str
) -> nn.Module:
    """Build the network of a model's own files as nnU-Net's predictor builds it, with new weights.

    Raises:
        RuntimeError: there is no such trainer.
    """
    manager = plans.get_configuration(configuration)
    build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
    described: tuple[Any, ...] = (plans, manager)
    if "plans_manager" not in inspect.signature(build).parameters:  # trainers for earlier versions of nnU-Net
        name, kwargs = manager.network_arch_class_name, manager.network_arch_init_kwargs
        described = (name, kwargs, manager.network_arch_init_kwargs_req_import)
    channels = determine_num_input_channels(plans, manager, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    return build(*described, channels, heads, enable_deep_supervision=False)
