"""The steps of the demo, each with nnU-Net's own commands."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID

from masksam_nnunet.environment import BUDGET_MINUTES, BUDGET_PROGRESS_FILE, TRAINING_STATS_FILE
from masksam_nnunet.errors import DemoError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.history import History, TrainingStats
from masksam_nnunet.inference.label_maps import Classes, LabelMapError
from masksam_nnunet.inference.phantoms import DATASET_NAME, write_phantom_dataset
from masksam_nnunet.inference.scoring import Scores, policies, score_folder
from masksam_nnunet.inference.versions import versions
from masksam_nnunet.plans.raw_check import require_sound_dataset
from masksam_nnunet.plans.raw_data import RawDataset, place_raw_dataset, read_raw_dataset
from masksam_nnunet.plans.splits import group_by_patient, patient_folds

from .commands import PROCESSES, run_nnunet
from .demo_end import next_commands
from .demo_folder import PHANTOMS, PLANS, DemoFolder
from .demo_pictures import draw_pictures
from .demo_progress import DemoProgress
from .demo_report import MethodResult, Report

_FULL = "3d_fullres"
_TRAINING_SHARE = 0.95  # of a training's bar; the rest is validation


@dataclass(frozen=True)
class Method:
    """A method to train: its name for people, and nnU-Net's name for it."""

    name: str
    trainer: str


BASELINE = Method("nnU-Net", "nnUNetTrainer_budget")
MASKSAM = Method("MaskSAM (tiny)", "MaskSAMTrainer_tiny_budget")
METHODS = (BASELINE, MASKSAM)


class DemoSteps:
    """The steps of one demo, to be taken in the order of the methods below."""

    def __init__(self, folder: DemoFolder, progress: DemoProgress, environment: Mapping[str, str]) -> None:
        """Args: where to work, where to tell of it, and the environment of nnU-Net's commands."""
        self.folder = folder
        self.settings = folder.settings
        self.progress = progress
        self.environment = environment
        self.notes: list[str] = []

    def place_data(self, given: RawDataset | None) -> RawDataset:
        """The raw dataset in the demo's nnUNet_raw."""
        with self.progress.step("data", "Writing phantoms" if given is None else f"Linking {given.name}"):
            if given is not None:
                return place_raw_dataset(given, self.folder.raw)
            target = self.folder.raw / DATASET_NAME
            if self.folder.take("data"):
                self.progress.reused(DATASET_NAME)
            else:
                shutil.rmtree(target, ignore_errors=True)  # half written, if there
                write_phantom_dataset(self.folder.raw, seed=self.settings.seed)
                self.folder.finish("data")
            return read_raw_dataset(target)

    def preprocess(self, dataset: RawDataset) -> str:
        """Plan, preprocess, set batch size and folds; returns the configuration."""
        base = self.folder.preprocessed / dataset.name
        plans_file = base / f"{PLANS}.json"
        with self.progress.step("preprocess", "Planning and preprocessing (nnUNetv2_plan_and_preprocess)"):
            if self.folder.take("preprocess"):
                self.progress.reused("plans and preprocessed data")
            else:
                shutil.rmtree(base, ignore_errors=True)
                self._plan(dataset, plans_file)
                groups = group_by_patient(dataset.images)
                if groups is not None:
                    write_json(base / "splits_final.json", _folds(groups))
                self.folder.finish("preprocess")
            configuration = _configuration(read_json(plans_file))
        groups = group_by_patient(dataset.images)
        if groups is not None:
            self.notes.append(
                f"The case names show several images of one patient, so the folds were drawn by patient "
                f"({len(groups)} patients, {len(dataset.images)} cases): no patient is on both sides."
            )
        if configuration != _FULL:
            self.notes.append(f"nnU-Net planned no 3d_fullres for this dataset; {configuration} was used.")
        return configuration

    def _plan(self, dataset: RawDataset, plans_file: Path) -> None:
        require_sound_dataset(dataset.folder)
        processes = str(PROCESSES)
        arguments = ["-d", dataset.number, "-c", _FULL, "-npfp", processes, "-np", processes]
        run_nnunet(
            "nnUNetv2_plan_and_preprocess",
            [*arguments, "--verify_dataset_integrity"],
            self.environment,
            self.folder.log("plan_and_preprocess"),
        )
        plans = read_json(plans_file)
        configuration = _configuration(plans)
        if configuration != _FULL:  # the command above skipped what is not in the plans
            arguments = ["-d", dataset.number, "-c", configuration, "-np", processes]
            run_nnunet("nnUNetv2_preprocess", arguments, self.environment, self.folder.log("preprocess"))
        plans["configurations"][configuration]["batch_size"] = self.settings.batch_size
        write_json(plans_file, plans)

    def train(self, dataset: RawDataset, configuration: str, method: Method) -> None:
        """Train one method for its minutes and let nnU-Net validate it."""
        minutes, trainer = self.settings.minutes, method.trainer
        with self.progress.step(trainer, f"Training {method.name} for {minutes:g} minutes (nnUNetv2_train)"):
            fold = self._fold(dataset, configuration, method)
            complete = (fold / "validation" / "summary.json").is_file() and (fold / TRAINING_STATS_FILE).is_file()
            if complete and self.folder.take(trainer):
                self.progress.reused(f"{method.name}, trained and validated")
                return
            shutil.rmtree(fold, ignore_errors=True)  # an unfinished training
            environment = dict(self.environment) | {BUDGET_MINUTES: str(minutes)}
            if self.settings.device == "cpu":
                environment["nnUNet_n_proc_DA"] = "0"  # the training itself uses every core
            bar = self.progress.add_bar(f"  {method.name}")
            run_nnunet(
                "nnUNetv2_train",
                [dataset.name, configuration, str(self.settings.fold), "-tr", trainer, "-device", self.settings.device],
                environment,
                self.folder.log(trainer),
                poll=partial(self._show_training, bar, trainer, fold),
            )
            stats = TrainingStats.read(fold)
            self.progress.close_bar(bar, f"{stats.iterations} iterations in {stats.train_seconds:.0f} s, validated")
            self.folder.finish(trainer)

    def _show_training(self, bar: TaskID, trainer: str, fold: Path) -> None:
        if (fold / "checkpoint_final.pth").is_file():
            predicted = sum(
                1 for path in (fold / "validation").glob("*") if path.suffix not in (".json", ".npz", ".pkl")
            )
            self.progress.advance(bar, trainer, _TRAINING_SHARE, f"predicting validation cases, {predicted} done")
            return
        try:
            state = read_json(fold / BUDGET_PROGRESS_FILE)
            fraction, iterations, loss = float(state["fraction"]), int(state["iterations"]), state["loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there yet
        shown = "" if loss is None else f", loss {float(loss):.3f}"
        self.progress.advance(bar, trainer, _TRAINING_SHARE * min(fraction, 1.0), f"{iterations} iterations{shown}")

    def _fold(self, dataset: RawDataset, configuration: str, method: Method) -> Path:
        return self.folder.model(dataset.name, method.trainer, configuration) / f"fold_{self.settings.fold}"

    def report(self, dataset: RawDataset, configuration: str) -> Report:
        """Score, draw and put together what the report says."""
        base = self.folder.preprocessed / dataset.name
        split = read_json(base / "splits_final.json")[self.settings.fold]
        classes = Classes.from_dataset_json(dataset.dataset_json)
        folds = {method.name: self._fold(dataset, configuration, method) for method in METHODS}
        methods = [
            MethodResult(
                method.name,
                method.trainer,
                self._score(dataset, folds[method.name], split["val"]),
                TrainingStats.read(folds[method.name]),
            )
            for method in METHODS
        ]
        trainers = [method.trainer for method in METHODS]
        if self.folder.reused:
            self.notes.append(
                "Taken over from an earlier run with the same settings that was broken off or repeated: "
                + ", ".join(self.folder.reused)
                + "."
            )
        pictures = draw_pictures(
            dataset=dataset,
            classes=classes,
            folds=folds,
            histories={name: History.read(fold / "checkpoint_final.pth") for name, fold in folds.items()},
            ranking={case.case: case.mean_dice for case in methods[-1].scores.cases},
            preprocessed=base,
            masksam=MASKSAM.name,
        )
        return Report(
            dataset=dataset.name,
            phantoms=self.settings.data == PHANTOMS,
            fold=self.settings.fold,
            cases=sorted(split["val"]),
            training_cases=len(split["train"]),
            configuration=configuration,
            batch_size=self.settings.batch_size,
            minutes=self.settings.minutes,
            device=_device_name(self.settings.device),
            versions=versions(),
            scoring=policies(methods[0].scores, classes.ignore_label is not None),
            notes=self.notes,
            methods=methods,
            classes=pictures.colours,
            curves=pictures.curves,
            case_pictures=pictures.cases,
            inside_pictures=pictures.inside,
            commands=next_commands(dataset, configuration, self.settings.fold, trainers, self.settings.device),
        )

    def _score(self, dataset: RawDataset, fold: Path, cases: Sequence[str]) -> Scores:
        truths = self.folder.preprocessed / dataset.name / "gt_segmentations"
        try:
            scores = score_folder(fold / "validation", truths, dataset.dataset_json, cases)
        except LabelMapError as error:
            raise DemoError(f"scoring {fold.parent.name}: {error}") from error
        theirs = read_json(fold / "validation" / "summary.json")["foreground_mean"]["Dice"]
        if not math.isclose(scores.mean_dice, theirs, abs_tol=1e-6) and not math.isnan(scores.mean_dice):
            raise DemoError(
                f"the mean Dice of {fold.parent.name} is {scores.mean_dice}, but nnU-Net's summary.json says {theirs}: "
                "the validation folder changed after the training; remove the fold's folder and run again"
            )
        return scores


def _configuration(plans: Mapping[str, Any]) -> str:
    return _FULL if _FULL in plans["configurations"] else "2d"


def _folds(groups: dict[str, list[str]]) -> list[dict[str, list[str]]]:
    try:
        return patient_folds(groups)
    except ValueError as error:
        raise DemoError(f"--data: {error}") from error


def _device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} CPU cores"
