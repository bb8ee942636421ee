"""What a benchmark compares, and what must hold before any of it is trained."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import BaseModel, ConfigDict

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.methods import ModelName, has_budget
from masksam_nnunet.plans.raw_data import find_dataset, number_of, read_raw_dataset
from masksam_nnunet.plans.splits import NUM_FOLDS, group_by_regex, patient_folds, read_splits, split_warning
from masksam_nnunet.plans.training_inputs import preprocessed_cases, require_cases, require_configuration

from .checks import check_splits, refuse_unfair
from .jobs import FoldJob

DEFINITION_FILE = "benchmark.json"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_PRIMUS_TOKEN = 8


class Benchmark(BaseModel):
    """What a benchmark's folder is about, kept in its ``benchmark.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    configuration: str
    methods: tuple[ModelName, ...]  # to compare, all of this configuration
    folds: tuple[int, ...]
    minutes: float | None = None  # for trainers with a budget, else None
    iterations: int | None = None  # for them, in place of minutes
    device: str = "cuda"  # cpu, cuda or mps
    ensembles: bool = True  # of all pairs; validation then saves probabilities
    postprocessing: bool = True  # nnU-Net's, chosen and reported; ensembles need it
    accept_unfair: bool = False  # report an unfair comparison too
    processes: int = 2  # workers that score and ensemble
    notes: tuple[str, ...] = ()  # what a reader must know about this run; they open its report
    group: str | None = None  # regular expression that finds the patient in a case's name, as masksam split --group
    train_patients: int | None = None  # of each fold, in a few-label study; None is all of them
    seed: int | None = None  # of the draw of these patients

    @classmethod
    def read(cls, out: Path) -> Benchmark:
        """Read it from its folder; a UsageError if the file is missing or damaged."""
        file = out / DEFINITION_FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is missing or damaged ({error}); run masksam benchmark --out {out}") from error

    def write(self, out: Path) -> None:
        """Write it over an earlier one; a UsageError if that has another dataset or configuration."""
        if (out / DEFINITION_FILE).is_file():
            there = Benchmark.read(out)
            if (there.dataset, there.configuration) != (self.dataset, self.configuration):
                its = f"{there.dataset}, {there.configuration}"
                raise UsageError(f"--out {out} holds a benchmark of {its}; give another folder")
        try:
            write_json(out / DEFINITION_FILE, self.model_dump())
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {error}; give another folder") from error

    @property
    def results(self) -> Path:
        """The dataset's folder in nnUNet_results."""
        return Path(os.environ["nnUNet_results"]) / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The dataset's folder in nnUNet_preprocessed."""
        return Path(os.environ["nnUNet_preprocessed"]) / self.dataset

    @property
    def command_line(self) -> str:
        """The command that makes it on one machine; folder and workers, which change no result, are left out."""
        words = ["masksam", "benchmark", "-d", self.dataset, "-c", self.configuration]
        words += ["--trainers", *(f"{method.trainer}@{method.plans}" for method in self.methods)]
        words += ["--folds", *map(str, self.folds), "-device", self.device]
        words += [] if self.minutes is None else ["--minutes", f"{self.minutes:g}"]
        words += [] if self.iterations is None else ["--iterations", str(self.iterations)]
        words += [] if self.ensembles or len(self.methods) < 2 else ["--no-ensembles"]
        words += [] if self.postprocessing else ["--no-postprocessing"]
        words += [] if self.group is None else ["--group", self.group]
        words += [] if self.train_patients is None else ["--train-cases", str(self.train_patients)]
        words += [] if self.seed is None else ["--seeds", str(self.seed)]
        words += ["--accept-unfair"] if self.accept_unfair else []
        return shlex.join(words)

    def patients(self, cases: Sequence[str]) -> dict[str, str] | None:
        """Patient by case; None without ``group``. A DataError if the expression does not fit the names."""
        if self.group is None:
            return None
        groups = group_by_regex(cases, self.group)
        return {case: patient for patient, members in groups.items() for case in members}

    def environment(self) -> dict[str, str]:
        """This process's variables of nnU-Net and MaskSAM, with absolute folders."""
        found = {key: value for key, value in os.environ.items() if key.startswith(("nnUNet_", "MASKSAM_"))}
        found |= {name: os.path.abspath(found[name]) for name in FOLDERS}
        return found | {EXT_TRAINER: ext_trainer_value(found.get(EXT_TRAINER))}

    def jobs(self) -> tuple[FoldJob, ...]:
        """One job for each method and fold, fold by fold."""
        environment, npz = self.environment(), self.ensembles and len(self.methods) > 1
        return tuple(
            FoldJob(
                *(self.dataset, method, fold, self.device, environment),
                minutes=self.minutes if has_budget(method) else None,
                iterations=self.iterations if has_budget(method) else None,
                npz=npz,
            )
            for fold in self.folds
            for method in self.methods
        )

    def check(self) -> list[str]:
        """Check all that can be checked before training, and write nnU-Net's default split where there is none.

        Returns:
            Notes for the user.

        Raises:
            MaskSAMError: what is missing or wrong, and the remedy.
        """
        notes = self.check_inputs()
        for job in self.jobs():
            if any(job.folder.glob("checkpoint_*.pth")):
                job.require_unchanged()
        return notes

    def check_inputs(self) -> list[str]:
        """:meth:`check` without the folds whose training has begun."""
        name = find_dataset(self.dataset, FOLDERS)
        own_schedule = [method.trainer for method in self.methods if not has_budget(method)]
        given = [name for name in ("minutes", "iterations") if getattr(self, name) is not None]
        if len(given) != (len(own_schedule) < len(self.methods)):
            found = " and ".join(f"--{name} {getattr(self, name):g}" for name in given) or "neither is given"
            needed = "trainers whose names end in _budget need one of --minutes and --iterations, and only they"
            raise UsageError(f"{needed}; {found}")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise UsageError(f"--minutes {self.minutes:g}: give a positive number")
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"--iterations {self.iterations}: give a positive number")
        cases = sorted(read_raw_dataset(Path(os.environ["nnUNet_raw"]) / name, "-d", min_cases=1).images)
        for method in self.methods:
            self._check_method(method, cases)
        file = self.preprocessed / "splits_final.json"
        # Written before any job starts: several jobs would each write one.
        try:
            if not file.is_file():
                with FileLock(self.preprocessed / ".splits_final.lock"):
                    if not file.is_file():
                        self._write_default_split(file, cases)
        except OSError as error:
            raise DataError(f"{file} is missing and cannot be written: {error}; make its folder writable") from error
        splits = read_splits(file, cases)
        findings = check_splits(splits, self.folds, cases, name, self.patients(cases))
        notes = [finding.text for finding in findings if finding.severe]
        refuse_unfair(notes, self.accept_unfair, "these folds make no fair comparison")
        if given and own_schedule:
            notes.append(f"--{given[0]} does not limit {', '.join(own_schedule)}: their time may differ")
        return notes

    def _check_method(self, method: ModelName, cases: Sequence[str]) -> None:
        number = number_of(self.dataset)
        found = require_configuration(self.preprocessed, method.plans, method.configuration, number, method.trainer)
        if found.previous_stage_name is not None:
            raise UsageError(f"-c {method.configuration} is a second stage; compare 2d, 3d_lowres or 3d_fullres")
        if "Primus" in method.trainer and any(size % _PRIMUS_TOKEN for size in found.patch_size):
            raise DataError(
                f"{method.trainer} needs a patch size that {_PRIMUS_TOKEN} divides, not {list(found.patch_size)}; "
                f"name other plans: --trainers {method.trainer}@PLANS"
            )
        data = found.data_identifier
        require_cases(self.preprocessed, method.plans, method.configuration, data, number, method.trainer, cases)

    def _write_default_split(self, file: Path, cases: Sequence[str]) -> None:
        number = number_of(self.dataset)
        remedy = split_warning(cases, None, number)
        if self.group is not None:
            remedy = f"write it with masksam split -d {number} --group '{self.group}'"
        if remedy is not None:
            raise DataError(f"{file} is missing: {remedy}")
        # As nnU-Net's do_split, whose cases are those of the preprocessed data.
        plans = PlansManager(read_json(self.preprocessed / f"{self.methods[0].plans}.json"))
        identifier = plans.get_configuration(self.configuration).data_identifier
        there = sorted(preprocessed_cases(self.preprocessed / identifier))
        if len(there) < NUM_FOLDS:
            raise DataError(f"{self.dataset} has {len(there)} cases, five folds need five; write {file} yourself")
        write_json(file, patient_folds({case: [case] for case in there}))
