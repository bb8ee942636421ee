"""What the training of a fold took, kept beside its checkpoints over all its parts."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

from masksam_nnunet.environment import TRAINING_STATS_FILE
from masksam_nnunet.errors import BenchmarkError, CheckpointError, DemoError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.history import epoch_seconds, read_log
from masksam_nnunet.inference.versions import git_hash, versions

from .results import FoldCompute, Method

RECORD_FILE = "benchmark_run.json"
PROCESS_FILE = "benchmark_process.json"
"""Written by the training process; taken over into the record when it has ended."""

PartKind = Literal["train", "continue", "validate"]


@dataclass(frozen=True)
class Inputs:
    """SHA-256 of the files that a training reads beside the data."""

    splits_sha256: str
    plans_sha256: str
    dataset_sha256: str

    @classmethod
    def read(cls, preprocessed: Path, plans: str) -> Inputs:
        """Args: the dataset's folder in nnUNet_preprocessed, and the plans' name."""
        names = ("splits_final.json", f"{plans}.json", "dataset.json")
        return cls(*(sha256_of(preprocessed / name) for name in names))


def sha256_of(file: Path) -> str:
    """Hexadecimal; file system errors are their own."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass
class FoldRecord:
    """The content of ``benchmark_run.json``.

    Attributes:
        folder: of the fold; not written.
        trainer: nnU-Net's name.
        plans: nnU-Net's name.
        configuration: nnU-Net's name.
        minutes: of a time-budget trainer, else None.
        inputs: at the start of the training; None where it was started outside the benchmark.
        git_hash: of this package's checkout at the start, if any.
        versions: of packages at the start.
        parts: each run of nnU-Net's command: ``kind``, ``command``, ``start`` and ``end`` (ISO times; end None if the
            benchmark itself was killed), ``exit_status`` (None likewise), ``host``, and ``process``: what the
            training process told of itself, see :mod:`nnunet_process`; ``git_hash``, ``versions`` and, without
            folders, ``variables`` of nnU-Net, MaskSAM and CUDA as they were in this part.
    """

    folder: Path
    trainer: str
    plans: str
    configuration: str
    minutes: float | None
    inputs: Inputs | None
    git_hash: str | None = field(default_factory=git_hash)
    versions: Mapping[str, str] = field(default_factory=versions)
    parts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record of a fold; None where the benchmark has not touched it.

        Raises:
            BenchmarkError: if it is not readable.
        """
        file = folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            content = read_json(file)
            hashes = [content[name] for name in ("splits_sha256", "plans_sha256", "dataset_sha256")]
            return cls(
                folder,
                content["trainer"],
                content["plans"],
                content["configuration"],
                content["minutes"],
                inputs=None if None in hashes else Inputs(*hashes),
                git_hash=content["git_hash"],
                versions=content["versions"],
                parts=content["parts"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{file} is not a benchmark's record ({error!r}); remove it, and the fold counts as trained elsewhere"
            ) from error

    def of_this_training(self) -> list[dict[str, Any]]:
        """Its parts without validations, and without a training that was given up before it began anew."""
        begun = [index for index, part in enumerate(self.parts) if part["kind"] == "train"]
        return [part for part in self.parts[begun[-1] if begun else 0 :] if part["kind"] != "validate"]

    def all_versions(self) -> dict[str, str]:
        """Versions of packages over all parts of the training, ``then`` between those that changed."""
        sources = [self.versions, *(part.get("versions") or {} for part in self.of_this_training())]
        names = dict.fromkeys(name for source in sources for name in source)
        return {name: _changes(source.get(name) for source in sources) for name in names}

    def all_commits(self) -> str | None:
        """This package's commits over all parts of the training, ``then`` between them; None: not recorded."""
        return _changes([self.git_hash, *(part.get("git_hash") for part in self.of_this_training())]) or None

    @property
    def resumed(self) -> int:
        """How often the training went on from a checkpoint."""
        return sum(part["kind"] == "continue" for part in self.of_this_training())

    def begin_part(self, kind: PartKind, command: str, variables: Mapping[str, str]) -> None:
        """Note that nnU-Net's command starts now, in an environment of these ``variables``."""
        self._take_process_file()  # of a part whose benchmark was killed
        self.parts.append(
            {
                "kind": kind,
                "command": command,
                "start": _now(),
                "end": None,
                "exit_status": None,
                "host": socket.gethostname(),
                "process": None,
                "git_hash": git_hash(),
                "versions": versions(),
                "variables": _variables(variables),
            }
        )
        self.write()

    def end_part(self, exit_status: int | None) -> None:
        """Note that it has ended; None: it was ended by us."""
        self._take_process_file()
        self.parts[-1] |= {"end": _now(), "exit_status": exit_status}
        self.write()

    def write(self) -> None:
        """Write atomically.

        Raises:
            BenchmarkError: if that cannot be done.
        """
        hashes = {name: getattr(self.inputs, name, None) for name in Inputs.__dataclass_fields__}
        content = {
            "trainer": self.trainer,
            "plans": self.plans,
            "configuration": self.configuration,
            "minutes": self.minutes,
            **hashes,
            "git_hash": self.git_hash,
            "versions": dict(self.versions),
            "resumed": self.resumed,
            "parts": self.parts,
        }
        try:
            write_json(self.folder / RECORD_FILE, content)
        except OSError as error:
            raise BenchmarkError(
                f"cannot write {self.folder / RECORD_FILE}: {error}; make room or make the folder writable, and run "
                "again: what is trained is kept"
            ) from error

    def _take_process_file(self) -> None:
        file = self.folder / PROCESS_FILE
        if not file.is_file():
            return
        if self.parts:
            self.parts[-1]["process"] = read_json(file)
        file.unlink()

    def differences(self, method: Method, minutes: float | None, inputs: Inputs) -> list[str]:
        """What is not now as it was when the fold's training began, in words."""
        found = []
        if (self.trainer, self.plans, self.configuration) != (method.trainer, method.plans, method.configuration):
            found.append(f"it was trained as {self.trainer}, {self.plans}, {self.configuration}")
        if self.minutes != minutes:
            found.append(f"it was trained with --minutes {_or_none(self.minutes)}, not {_or_none(minutes)}")
        names = {
            "splits_sha256": "splits_final.json",
            "plans_sha256": f"{method.plans}.json",
            "dataset_sha256": "dataset.json",
        }
        for key, name in names.items():
            if self.inputs is not None and getattr(self.inputs, key) != getattr(inputs, key):
                found.append(f"{name} in nnUNet_preprocessed has changed since")
        return found


def read_fold_compute(fold_folder: Path) -> FoldCompute:
    """What a trained fold took, as far as it was recorded; seconds and epochs also from nnU-Net's own log.

    Raises:
        BenchmarkError: if the fold is not trained, or its record is not readable.
        CheckpointError: if its checkpoint is not readable.
    """
    checkpoint = fold_folder / "checkpoint_final.pth"
    if not checkpoint.is_file():
        raise BenchmarkError(f"{fold_folder} holds no checkpoint_final.pth: this fold is not trained")
    record = FoldRecord.read(fold_folder)
    parts = [] if record is None else record.of_this_training()
    told = [part["process"] for part in parts if part["process"]]
    last: Mapping[str, Any] = told[-1] if told else {}
    devices = list(dict.fromkeys(process["device"] for process in told))
    budget = _budget_stats(fold_folder)
    try:
        epochs = epoch_seconds(read_log(checkpoint), checkpoint)
    except DemoError as error:
        raise CheckpointError(str(error)) from error
    per_epoch = last.get("iterations_per_epoch")
    peaks = [process["peak_memory_mib"] for process in told]
    if "peak_memory_mb" in budget:
        peaks.append(budget["peak_memory_mb"])
    return FoldCompute(
        fold=int(fold_folder.name.removeprefix("fold_")),
        seconds=budget.get("train_seconds", sum(epochs)),
        peak_memory_mib=max(peaks, default=None),
        peak_memory_of=last.get("peak_memory_of", budget.get("peak_memory_of", "not recorded")),
        device=" and ".join(devices) or budget.get("device", "not recorded"),
        iterations=budget.get("iterations", None if per_epoch is None else per_epoch * len(epochs)),
        epochs=len(epochs),
        parameters=last.get("parameters", budget.get("parameters")),
        trainable_parameters=last.get("trainable_parameters", budget.get("trainable_parameters")),
        checkpoint_bytes=checkpoint.stat().st_size,
        resumed=0 if record is None else record.resumed,
        git_hash=None if record is None else record.all_commits(),
        wall_seconds=_wall_seconds(parts),
    )


def _wall_seconds(parts: Sequence[Mapping[str, Any]]) -> float | None:
    """From each trainer's making to its validation or its end, over all parts; None where one did not tell."""
    told = [float(part["process"]["wall_seconds"]) for part in parts if "wall_seconds" in (part["process"] or {})]
    return sum(told) if told and len(told) == len(parts) else None


def _budget_stats(fold_folder: Path) -> Mapping[str, Any]:
    """What a time-budget trainer wrote; its iterations do not follow from its epochs."""
    try:
        stats: Mapping[str, Any] = read_json(fold_folder / TRAINING_STATS_FILE)
    except (OSError, ValueError):
        return {}
    return stats


def _changes(values: Iterable[str | None]) -> str:
    """What is known, in its order, without repetitions side by side."""
    return " then ".join(value for value, _ in groupby(value for value in values if value is not None))


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that change a training; folders are its user's own business."""
    folders = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer")
    prefixes = ("nnUNet_", "MASKSAM_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {
        k: v for k, v in sorted(environment.items()) if k.startswith(prefixes) and k not in folders and "/" not in v
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _or_none(minutes: float | None) -> str:
    return "none" if minutes is None else f"{minutes:g}"
