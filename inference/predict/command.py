"""What nnU-Net's predict command does once it has read its arguments, with one model or several."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from masksam_nnunet.errors import PredictError
from masksam_nnunet.files import read_json, write_json

from ..cases import Case, find_cases
from ..models import Model, previous_stage, reader_of
from ..predictor import MaskSAMPredictor
from .ensemble import Ensemble, predict_ensemble
from .output import is_whole, remove
from .postprocessing import Postprocessing
from .run import Crew, PredictOptions, predict_cases

ARGUMENTS = "predict_from_raw_data_args.json"
"""nnU-Net's file of what a folder was predicted with."""

Source = Callable[[Sequence["int | str"], str], tuple[Sequence[Model], "Postprocessing | None"]]
"""Finds the models to predict with, given the folds and the name of the checkpoint, and what is done afterwards."""


class PredictCommand:
    """Stands in nnU-Net's command for its predictor: is told what the command read, then predicts.

    Everything is checked before a model is loaded. Methods and their arguments are those that the command calls.

    Args:
        source: of the models.
        batch_size: of MaskSAMPredictor.
        settings: nnU-Net's, for its predictor.
    """

    def __init__(self, source: Source, batch_size: int | None, **settings: Any) -> None:
        self._source = source
        self._settings = settings
        self.make_predictor = partial(MaskSAMPredictor, batch_size=batch_size, **settings)
        self._models: Sequence[Model] = ()
        self._postprocessing: Postprocessing | None = None

    def initialize_from_trained_model_folder(
        self, model_training_output_dir: str, use_folds: Sequence[int | str], checkpoint_name: str
    ) -> None:
        """Find and check the models; ``source`` knows of their folders.

        Raises:
            PredictError: there is none, or it lacks something.
        """
        self._models, self._postprocessing = self._source(tuple(use_folds), checkpoint_name)
        for model in self._models:
            model.check()

    def predict_from_files_sequential(self, source: str, output: str, **options: Any) -> None:
        """As :meth:`predict_from_files`, in this process alone."""
        self.predict_from_files(
            source, output, num_processes_preprocessing=0, num_processes_segmentation_export=0, **options
        )

    def predict_from_files(
        self,
        source: str,
        output: str,
        *,
        save_probabilities: bool,
        overwrite: bool,
        num_processes_preprocessing: int,
        num_processes_segmentation_export: int,
        folder_with_segs_from_prev_stage: str | None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> None:
        """Predict the cases of a folder, with what nnU-Net leaves in the other: labels, plans, dataset, arguments.

        Raises:
            PredictError: nothing can be predicted, or some cases could not; these are listed.
        """
        out = Path(output)
        previous = Path(folder_with_segs_from_prev_stage) if folder_with_segs_from_prev_stage else None
        for option, processes in (("-npp", num_processes_preprocessing), ("-nps", num_processes_segmentation_export)):
            if processes < 0:
                raise PredictError(f"{option} {processes}: a number of processes is 0, for none but this one, or more")
        if previous is not None and not previous.is_dir():
            raise PredictError(f"-prev_stage_predictions {previous}: there is no such folder")
        first = self._models[0]
        ending = first.dataset_json["file_ending"]
        found, failed = find_cases(Path(source), ending)
        ensemble = self._checked(out, previous)
        make_output_folder(out)
        if out.samefile(source):
            raise PredictError(f"-o {out} is the folder of the images (-i): name another one")
        cases = found[part_id::num_parts]
        arguments = {
            "list_of_lists_or_source_folder": source,
            "output_folder_or_list_of_truncated_output_files": output,
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "num_processes_preprocessing": num_processes_preprocessing,
            "num_processes_segmentation_export": num_processes_segmentation_export,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
            "num_parts": num_parts,
            "part_id": part_id,
            "masksam": self._identity(),
        }
        options = PredictOptions(
            save_probabilities, num_processes_preprocessing, num_processes_segmentation_export, self._postprocessing
        )
        wanted = cases if overwrite else self._not_done(cases, out, save_probabilities)
        print(f"{len(wanted)} cases to predict; {len(cases) - len(wanted)} were done before", flush=True)
        if ensemble is not None:
            self._begin(wanted, out, arguments)
            with Crew(options) as crew:
                failed |= predict_ensemble(ensemble, self.make_predictor, wanted, out, not overwrite, options, crew)
        elif wanted:
            predictor = self.make_predictor()
            first.load(predictor)
            self._begin(wanted, out, arguments)
            stage = previous if previous_stage(first) else None
            with Crew(options) as crew:
                failed |= predict_cases(predictor, wanted, out, options, crew, stage)
        if failed:
            raise PredictError(_listed(failed, out))

    def _checked(self, out: Path, previous: Path | None) -> Ensemble | None:
        """The models as an ensemble; None if there is one only."""
        if len(self._models) > 1:
            return Ensemble.of(self._models, out, previous)
        stage = previous_stage(self._models[0])
        if stage is not None and previous is None:
            raise PredictError(
                f"{self._models[0].name} is a cascade: predict these images with its {stage} model first, and give "
                "that folder: -prev_stage_predictions FOLDER"
            )
        return None

    def _not_done(self, cases: Sequence[Case], out: Path, probabilities: bool) -> list[Case]:
        self._check_same_models(out)
        first = self._models[0]
        ending, reader = first.dataset_json["file_ending"], reader_of(first)
        return [case for case in cases if not is_whole(out / case.name, ending, reader, probabilities)]

    def _begin(self, cases: Sequence[Case], out: Path, arguments: dict[str, Any]) -> None:
        """Remove what is there of these cases, then tell what predicts them.

        Not when they are replaced: else what a second run did not come to would pass for its own.
        """
        first = self._models[0]
        for case in cases:
            remove(out / case.name, first.dataset_json["file_ending"])
        write_json(out / ARGUMENTS, arguments)
        write_json(out / "dataset.json", first.dataset_json)
        write_json(out / "plans.json", first.plans)

    def _identity(self) -> dict[str, Any]:
        """What predictions depend on, as JSON."""
        return {
            "models": [model.describe() for model in self._models],
            "postprocessing": str(self._postprocessing.file) if self._postprocessing else None,
            "tile_step_size": self._settings.get("tile_step_size"),
            "use_mirroring": self._settings.get("use_mirroring"),
        }

    def _check_same_models(self, out: Path) -> None:
        file = out / ARGUMENTS
        try:
            before = read_json(file).get("masksam") if file.is_file() else None
        except (OSError, ValueError, AttributeError) as error:
            raise PredictError(
                f"{file} cannot be read ({error}): without it nobody knows what predicted the cases in {out}; leave "
                "--continue_prediction out, or name another folder (-o)"
            ) from error
        now = json.loads(json.dumps(self._identity()))
        if before is not None and before != now:
            differing = next(key for key in now if before.get(key) != now[key])
            raise PredictError(
                f"--continue_prediction: {out} holds predictions with {differing} = {before.get(differing)}, now it is "
                f"{now[differing]}: leave --continue_prediction out to predict all anew, or name another folder (-o)"
            )


def make_output_folder(folder: str | Path) -> None:
    """Make it, and see whether it can be written to.

    Raises:
        PredictError: it cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PredictError(
            f"-o {folder}: no folder to write to ({error.strerror or error}); name another one, or make it writable"
        ) from error


def _listed(failed: dict[str, str], out: Path) -> str:
    count = "1 case" if len(failed) == 1 else f"{len(failed)} cases"
    lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(failed.items()))
    return (
        f"{count} could not be predicted:\n{lines}\nThe others are in {out}. Mend these and run the same command with "
        "--continue_prediction."
    )
