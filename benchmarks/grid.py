"""The grid of methods and folds, and what must hold before any of it is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import BenchmarkError, DataError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.methods import has_budget
from masksam_nnunet.plans.planning import find_dataset, preprocessed_cases
from masksam_nnunet.plans.raw_data import number_of, read_raw_dataset
from masksam_nnunet.plans.splits import NUM_FOLDS, SEED, group_by_regex, split_warning
from masksam_nnunet.plans.training_inputs import require_cases, require_configuration

from .errors import refuse_unfair
from .fairness_splits import check_splits
from .fold_record import FoldRecord, Inputs
from .results import Method
from .train_fold import FoldJob, changed_since

DEVICES = ("cpu", "cuda", "mps")
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_PRIMUS_TOKEN = 8


@dataclass(frozen=True)
class Grid:
    """What a benchmark trains.

    Attributes:
        dataset: full name; :func:`masksam_nnunet.plans.planning.find_dataset` gives it for a number.
        configuration: nnU-Net's.
        methods: to compare, all of this configuration.
        folds: numbers.
        minutes: for time-budget trainers, else None.
        device: ``cpu``, ``cuda`` or ``mps``.
        npz: whether probabilities of validation are saved, which ensembles need.
        group: regular expression that finds the patient in a case's name, as ``masksam split --group``; None where
            :func:`masksam_nnunet.plans.splits.group_by_patient` is to tell.
    """

    dataset: str
    configuration: str
    methods: tuple[Method, ...]
    folds: tuple[int, ...]
    minutes: float | None = None
    device: str = "cuda"
    npz: bool = True
    group: str | None = None

    def patients(self, cases: Sequence[str]) -> dict[str, str] | None:
        """Patient by case, None without ``group``.

        Raises:
            BenchmarkError: the expression does not fit the names.
        """
        if self.group is None:
            return None
        try:
            groups = group_by_regex(cases, self.group)
        except DataError as error:
            raise BenchmarkError(str(error)) from error
        return {case: patient for patient, members in groups.items() for case in members}

    @property
    def results(self) -> Path:
        """The dataset's folder in nnUNet_results."""
        return Path(os.environ["nnUNet_results"]) / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The dataset's folder in nnUNet_preprocessed."""
        return Path(os.environ["nnUNet_preprocessed"]) / self.dataset

    def minutes_of(self, method: Method) -> float | None:
        """The minutes that this method trains; None where its trainer counts epochs."""
        return self.minutes if has_budget(method) else None


def find_benchmark_dataset(dataset: str) -> str:
    """The full name of a dataset given by number or name.

    Raises:
        BenchmarkError: if one of nnU-Net's three variables is not set, or there is no such dataset.
    """
    for variable in _FOLDERS:
        if not os.environ.get(variable):
            raise BenchmarkError(f"{variable} is not set: export nnU-Net's three folders, {', '.join(_FOLDERS)}, first")
    try:
        return find_dataset(dataset)
    except DataError as error:
        raise BenchmarkError(str(error)) from error


def check_grid(grid: Grid, accept_unfair: bool = False) -> tuple[str, ...]:
    """Check all that can be checked before training, and write nnU-Net's default split where there is none.

    Args:
        grid: to be trained.
        accept_unfair: train in spite of folds that make no fair cross-validation.

    Returns:
        what the user should know, one sentence each.

    Raises:
        BenchmarkError: what is missing or wrong, and the remedy.
    """
    name = find_benchmark_dataset(grid.dataset)
    number = number_of(name)
    _check_options(grid)
    try:
        cases = sorted(read_raw_dataset(Path(os.environ["nnUNet_raw"]) / name, "-d", min_cases=1).images)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    for method in grid.methods:
        _check_method(grid, method, number, cases)
    splits = _splits(grid, number, cases)
    _check_folds(grid, splits, cases, number)
    notes = _check_fair(grid, splits, cases, accept_unfair)
    _check_begun(grid)
    own_schedule = [m.key for m in grid.methods if not has_budget(m)]
    if grid.minutes is not None and own_schedule:
        notes.append(
            f"--minutes {grid.minutes:g} is for trainers ending in _budget only: {', '.join(own_schedule)} train their "
            "own number of epochs, so the methods do not get the same time"
        )
    return tuple(notes)


def grid_jobs(grid: Grid) -> tuple[FoldJob, ...]:
    """One job for each method and fold, fold by fold; with this process's variables of nnU-Net and MaskSAM."""
    environment = {k: v for k, v in os.environ.items() if k.startswith(("nnUNet_", "MASKSAM_"))}
    environment |= {name: os.path.abspath(environment[name]) for name in _FOLDERS}
    environment[EXT_TRAINER] = ext_trainer_value(environment.get(EXT_TRAINER))
    return tuple(
        FoldJob(
            dataset=grid.dataset,
            method=method,
            fold=fold,
            device=grid.device,
            environment=environment,
            minutes=grid.minutes_of(method),
            npz=grid.npz,
        )
        for fold in grid.folds
        for method in grid.methods
    )


def _check_options(grid: Grid) -> None:
    if grid.device not in DEVICES:
        raise BenchmarkError(f"--devices {grid.device!r} is not known: choose one of {', '.join(DEVICES)}")
    if not grid.methods:
        raise BenchmarkError("--trainers: name at least one")
    if not grid.folds or min(grid.folds) < 0 or len(set(grid.folds)) < len(grid.folds):
        raise BenchmarkError(f"--folds {' '.join(map(str, grid.folds))}: give different numbers from 0 on")
    budget = [method.trainer for method in grid.methods if has_budget(method)]
    if grid.minutes is None and budget:
        raise BenchmarkError(
            f"{', '.join(budget)} train by the clock: give --minutes, the minutes for each fold, for example "
            "--minutes 30"
        )
    if grid.minutes is not None and not budget:
        raise BenchmarkError(
            f"--minutes {grid.minutes:g} is for trainers that stop by the clock, such as nnUNetTrainer_budget and "
            f"MaskSAMTrainer_tiny_budget; {', '.join(m.trainer for m in grid.methods)} do not: leave it out"
        )
    if grid.minutes is not None and not 0 < grid.minutes < 1e6:
        raise BenchmarkError(f"--minutes {grid.minutes:g}: give a positive number")


def _check_method(grid: Grid, method: Method, number: int, cases: Sequence[str]) -> None:
    plans_file = grid.preprocessed / f"{method.plans}.json"
    try:
        configuration = require_configuration(
            grid.preprocessed, method.plans, method.configuration, number, method.trainer
        )
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    if configuration.previous_stage_name is not None:
        raise BenchmarkError(
            f"-c {method.configuration} is the second stage of a cascade and needs predictions of the first; compare "
            "2d, 3d_lowres or 3d_fullres"
        )
    if "Primus" in method.trainer and any(size % _PRIMUS_TOKEN for size in configuration.patch_size):
        raise BenchmarkError(
            f"{method.trainer} needs a patch size that {_PRIMUS_TOKEN} divides, but {plans_file} has "
            f"{list(configuration.patch_size)}; write a plans file with another patch size and name it: "
            f"--trainers {method.trainer}@PLANS"
        )
    try:
        require_cases(
            grid.preprocessed, method.plans, method.configuration, configuration.data_identifier, number,
            method.trainer, cases,
        )  # fmt: skip
    except DataError as error:
        raise BenchmarkError(str(error)) from error


def _splits(grid: Grid, number: int, cases: Sequence[str]) -> list[Mapping[str, list[str]]]:
    """The folds in splits_final.json; nnU-Net's own default is written where there are none."""
    file = grid.preprocessed / "splits_final.json"
    if not file.is_file():
        # Before any job starts: several that found no file would each write one.
        with FileLock(grid.preprocessed / ".splits_final.lock"):
            if not file.is_file():
                _write_default_split(grid, file, number, cases)
    try:
        splits: list[Mapping[str, list[str]]] = read_json(file)
        for split in splits:
            if not set(split) >= {"train", "val"} or not split["val"]:
                raise ValueError("a fold lacks train or val")
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(
            f"{file} does not hold folds ({error}); write it again with: masksam split -d {number}, or remove it to "
            "have nnU-Net's default"
        ) from error
    return splits


def _write_default_split(grid: Grid, file: Path, number: int, cases: Sequence[str]) -> None:
    if not set(grid.folds) <= set(range(NUM_FOLDS)):
        raise BenchmarkError(
            f"--folds {' '.join(map(str, grid.folds))}: there is no {file}, and nnU-Net's default split has folds 0 to "
            f"{NUM_FOLDS - 1}; ask for these, or write a file with more"
        )
    warning = split_warning(cases, None, number)
    if grid.group is not None:
        raise BenchmarkError(f"{file} is missing: write it with masksam split -d {number} --group '{grid.group}'")
    if warning is not None:
        raise BenchmarkError(f"{file} is missing: {warning}")
    # As nnU-Net's do_split, from the data of the first method: it names the cases that all methods have.
    configuration = PlansManager(read_json(grid.preprocessed / f"{grid.methods[0].plans}.json")).get_configuration(
        grid.configuration
    )
    identifiers = sorted(preprocessed_cases(grid.preprocessed / configuration.data_identifier))
    if len(identifiers) < NUM_FOLDS:
        raise BenchmarkError(
            f"{grid.dataset} has {len(identifiers)} cases: five folds need five; write another {file.name}"
        )
    folds = generate_crossval_split(identifiers, seed=SEED, n_splits=NUM_FOLDS)
    # It returns numpy's strings.
    write_json(file, [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in folds])


def _check_folds(grid: Grid, splits: Sequence[Mapping[str, list[str]]], cases: Sequence[str], number: int) -> None:
    file = grid.preprocessed / "splits_final.json"
    beyond = [fold for fold in grid.folds if fold >= len(splits)]
    if beyond:
        raise BenchmarkError(
            f"--folds: {file} holds folds 0 to {len(splits) - 1}, not {', '.join(map(str, beyond))}; nnU-Net would "
            "silently train on a random split. Ask for those that are there, or write a file with more"
        )
    for fold in grid.folds:
        unknown = sorted({*splits[fold]["train"], *splits[fold]["val"]} - set(cases))
        if unknown:
            raise BenchmarkError(
                f"{file}: fold {fold} names {len(unknown)} cases that the dataset does not have, such as "
                f"{unknown[0]}; write it again, for example with: masksam split -d {number} --force"
            )


def _check_fair(
    grid: Grid, splits: list[Mapping[str, list[str]]], cases: Sequence[str], accept_unfair: bool
) -> list[str]:
    """Whether the folds make a cross-validation: better known before the training than after."""
    findings = check_splits(splits, grid.folds, cases, grid.dataset, grid.patients(cases))
    severe = [finding.text for finding in findings if finding.severe]
    refuse_unfair(severe, accept_unfair, "these folds make no fair comparison", "Mend splits_final.json")
    return severe


def _check_begun(grid: Grid) -> None:
    """Folds that were begun with other splits, plans or minutes would not be comparable."""
    for method in grid.methods:
        inputs = Inputs.read(grid.preprocessed, method.plans)
        for fold in grid.folds:
            folder = grid.results / method.key / f"fold_{fold}"
            record = FoldRecord.read(folder)
            begun = any(folder.glob("checkpoint_*.pth"))
            if record is not None and begun:
                differences = record.differences(method, grid.minutes_of(method), inputs)
                if differences:
                    raise BenchmarkError(changed_since(folder, differences))
