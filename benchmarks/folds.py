"""What the folder of a trained fold holds: how far the fold has come, its record, and what its training took."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field

from masksam_nnunet.checkpoints import damage
from masksam_nnunet.environment import TRAINING_STATS_FILE, cpu_name
from masksam_nnunet.errors import DataError, TrainingError
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.provenance import History, git_hash, versions
from masksam_nnunet.plans.architecture import DECISIONS

from .results import FoldCompute

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
RECORD_FILE = "benchmark_run.json"
_TRAINED, _VALIDATED = "Training done.", "Validation complete"


@contextmanager
def locked(folder: Path, busy: str, wait: float = 1.0, file: str = "benchmark.lock") -> Iterator[None]:
    """Lock a folder, on all machines that share it, until this process leaves the context or ends.

    The folder is created if missing. NFS needs version 4, Lustre the mount option ``flock``. ``busy`` says what a
    process that holds the lock is doing; ``wait`` is in seconds; ``file`` is what is locked.

    Raises:
        TrainingError: another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / file, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise TrainingError(f"{folder}: another process is {busy}; wait until it has ended, then run again") from error
    except (OSError, NotImplementedError) as error:
        raise TrainingError(f"{folder} cannot be locked: {error}; make it writable, on a disk with flock") from error
    try:
        yield
    finally:
        lock.release()


# ---- how far a fold has come -----------------------------------------------------------------------------------------


class Stage(Enum):
    """How far a fold has come."""

    MISSING = "missing"  # no checkpoint
    BROKEN_OFF = "broken off"  # a whole checkpoint_latest or checkpoint_best to continue from
    TRAINED = "trained"  # final checkpoint, but the validation is not complete
    DONE = "done"  # trained, and every validation case is predicted and scored
    DAMAGED = "damaged"  # the checkpoint to continue from is not a whole file


class FoldState(NamedTuple):
    """A stage, and how it was recognised."""

    stage: Stage
    reason: str


def fold_state(folder: Path, cases: Sequence[str], file_ending: str, npz: bool) -> FoldState:
    """How far a fold has come, judged by its folder alone, which need not exist.

    ``cases`` are its validation cases, with predictions of ``file_ending``; ``npz``: probabilities are needed too.
    """
    found = [name for name in (FINAL, LATEST, BEST) if (folder / name).is_file()]  # in the order of nnU-Net's --c
    if not found:
        return FoldState(Stage.MISSING, "there is no checkpoint")
    name = found[0]
    missing = _not_validated(folder, cases, file_ending, npz) if name == FINAL else None
    # Reading all bytes of a large model takes long, and is done where the file is going to be used.
    wrong = damage(folder / name, thorough=name != FINAL or missing is not None)
    if wrong is not None:
        others = [other for other in found[1:] if not damage(folder / other)]
        remedy = f"training then continues from {others[0]}" if others else "the fold is then trained from its start"
        return FoldState(Stage.DAMAGED, f"{folder / name} is damaged ({wrong}); remove it and run again: {remedy}")
    if name != FINAL:
        return FoldState(Stage.BROKEN_OFF, f"{name} is there, {FINAL} is not")
    if missing is not None:
        return FoldState(Stage.TRAINED, missing)
    return FoldState(Stage.DONE, f"{len(cases)} validation cases predicted and scored")


def _not_validated(folder: Path, cases: Sequence[str], file_ending: str, npz: bool) -> str | None:
    """What is missing from a validation; None if it is complete and newer than the training."""
    summary = folder / "validation" / "summary.json"
    for ending in (file_ending, ".npz", ".pkl") if npz else (file_ending,):
        files = [summary.with_name(f"{case}{ending}") for case in cases]
        # A killed process leaves files cut short. A label map cut short is noticed when it is scored.
        whole = zipfile.is_zipfile if ending == ".npz" else Path.is_file
        if missing := [file.name for file in files if not whole(file)]:
            return f"{len(missing)} of {len(cases)} validation cases have no whole {ending} file, such as {missing[0]}"
    try:
        scored = {Path(entry["prediction_file"]).name for entry in read_json(summary)["metric_per_case"]}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{summary} is missing or damaged"
    if unscored := [case for case in cases if f"{case}{file_ending}" not in scored]:
        return f"{summary} has no scores of {len(unscored)} of {len(cases)} cases"
    # nnU-Net's logs tell whether the validation belongs to the latest training. Files' times, which copies change,
    # count only where there are no logs.
    told = rf"{re.escape(_TRAINED)}|{re.escape(_VALIDATED)}|Loaded .*{re.escape(BEST)}: .*"
    line = re.compile(rf"^[\d\-]+ [\d:.]+: ({told})\s*$", re.MULTILINE)
    ends = line.findall("\n".join(read_logs(folder)))
    if _TRAINED in ends:
        if ends[-1] != _VALIDATED:
            return "nnU-Net's log has no complete validation after the training"
        return f"its predictions are those of {BEST} (--val_best)" if BEST in ends[-2] else None
    older = summary.stat().st_mtime_ns < (folder / FINAL).stat().st_mtime_ns
    return f"its predictions are older than {FINAL}" if older else None


def read_logs(folder: Path) -> list[str]:
    """nnU-Net's logs of a fold, one for each start, the earliest first."""
    # Month and day have no leading zeros: alphabetical order would be wrong.
    files = sorted(folder.glob("training_log_*.txt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


# ---- the record of its trainings -------------------------------------------------------------------------------------


def now() -> str:
    """The time, for records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Part(BaseModel):
    """One run of nnUNetv2_train."""

    kind: Literal["train", "continue", "validate"]
    command: str
    variables: dict[str, str]  # of nnU-Net, MaskSAM and CUDA, without folders
    start: str = Field(default_factory=now)
    host: str = Field(default_factory=socket.gethostname)
    git_hash: str | None = Field(default_factory=git_hash)
    versions: dict[str, str] = Field(default_factory=versions)
    end: str | None = None  # None, like all that follows, if the benchmark itself was killed
    exit_status: int | None = None
    device: str | None = None
    peak_memory_mib: float | None = None  # resident, of the command and its workers together, sampled
    train_seconds: float | None = None  # by the clock, up to the final checkpoint or the end


class FoldRecord(BaseModel):
    """The content of ``benchmark_run.json``: with what a fold was trained, and each run of nnUNetv2_train."""

    trainer: str
    plans: str
    configuration: str
    minutes: float | None
    iterations: int | None = None
    inputs: dict[str, str] | None  # input_hashes at the start; None if trained outside the benchmark
    parts: list[Part] = []

    @classmethod
    def read(cls, folder: Path) -> FoldRecord | None:
        """The record of a fold, None if the benchmark has not trained it; a TrainingError if it is damaged."""
        file = folder / RECORD_FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{file} is damaged ({error}); remove it, then run again") from error

    def write(self, folder: Path) -> None:
        """Write it into the fold's folder; a TrainingError if that is not possible."""
        try:
            write_json(folder / RECORD_FILE, self.model_dump())
        except OSError as error:
            raise TrainingError(f"cannot write {folder / RECORD_FILE}: {error}; make room and run again") from error

    def changed_inputs(self, preprocessed: Path) -> list[str]:
        """The names of those inputs that differ now from the start of the training."""
        now = input_hashes(preprocessed, self.plans, self.configuration)
        return [name for name, digest in (self.inputs or {}).items() if digest != now.get(name)]


def input_hashes(preprocessed: Path, plans: str, configuration: str) -> dict[str, str]:
    """SHA-256, by file name, of what a training reads in a dataset's preprocessed folder beside the data.

    Of the plans it reads one configuration: others may be planned later.
    """
    contents = {}
    for name in ("splits_final.json", f"{plans}.json", "dataset.json"):
        try:
            contents[name] = read_json(preprocessed / name)
        except (OSError, ValueError) as error:
            raise DataError(f"{preprocessed / name} cannot be read ({error}); restore it") from error
    whole, name = contents[f"{plans}.json"], configuration
    chosen: dict[str, Any] = {}
    while name in whole["configurations"]:
        chosen[name] = whole["configurations"][name]
        name = chosen[name].get("inherits_from")
    decisions = whole.get(DECISIONS, {}).get(configuration)
    contents[f"{plans}.json"] = whole | {"configurations": chosen, DECISIONS: decisions}
    found = {name: json.dumps(content, sort_keys=True).encode() for name, content in contents.items()}
    return {name: hashlib.sha256(text).hexdigest() for name, text in found.items()}


# ---- what its training took ------------------------------------------------------------------------------------------


def read_fold_compute(folder: Path, log: History) -> FoldCompute:
    """What the training of a fold took, as far as it is known.

    Sources are ``log``, which is nnU-Net's in the final checkpoint, this package's training_stats.json, the benchmark's
    record, and nnU-Net's debug.json.

    Raises:
        TrainingError: the fold's record is not readable.
    """
    record = FoldRecord.read(folder)
    parts = [] if record is None else [part for part in record.parts if part.kind != "validate"]
    begun = max((index for index, part in enumerate(parts) if part.kind == "train"), default=0)
    parts = parts[begun:]  # those that led to the final checkpoint
    stats, debug = (_read_if_there(folder / name) for name in (TRAINING_STATS_FILE, "debug.json"))
    sampled = [part.peak_memory_mib for part in parts if part.peak_memory_mib is not None]
    per_epoch = debug.get("num_iterations_per_epoch")
    devices = dict.fromkeys(part.device for part in parts if part.device)
    by_clock = [part.train_seconds for part in parts if part.train_seconds is not None]
    return FoldCompute(
        fold=int(folder.name.removeprefix("fold_")),
        seconds=stats.get("train_seconds", log.seconds[-1] if log.seconds else 0.0),
        peak_memory_mib=stats.get("peak_memory_mib", max(sampled, default=None)),
        peak_memory_of=stats.get("peak_memory_of", "all processes, resident" if sampled else "not recorded"),
        device=" and ".join(devices) or str(debug.get("gpu_name") or stats.get("device", "not recorded")),
        iterations=stats.get("iterations", None if per_epoch is None else int(per_epoch) * len(log.seconds)),
        epochs=len(log.seconds),
        parameters=stats.get("parameters", log.parameters),
        trainable_parameters=stats.get("trainable_parameters"),
        checkpoint_bytes=(folder / FINAL).stat().st_size,
        resumed=sum(part.kind == "continue" for part in parts),
        git_hash=_changes(part.git_hash for part in parts) or None,
        wall_seconds=sum(by_clock) if parts and len(by_clock) == len(parts) else None,
        versions={
            name: _changes(part.versions.get(name) for part in parts) for part in parts[:1] for name in part.versions
        },
    )


def device_name(folder: Path, device: str) -> str:
    """What trained in a fold's folder: the GPU that nnU-Net noted there, or the number of CPU cores here."""
    if device == "cpu":
        return cpu_name()
    return str(_read_if_there(folder / "debug.json").get("gpu_name", device))


def trained_budget(folder: Path) -> tuple[float | None, int | None] | None:
    """Minutes and iterations, one of them None, that the trainer itself noted; None if it had no budget."""
    stats = _read_if_there(folder / TRAINING_STATS_FILE)
    if "budget_iterations" in stats:
        return None, int(stats["budget_iterations"])
    return (float(stats["budget_seconds"]) / 60, None) if "budget_seconds" in stats else None


def _read_if_there(file: Path) -> Mapping[str, Any]:
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError):
        return {}


def _changes(values: Iterable[str | None]) -> str:
    """The known values in their order, ``then`` between those that differ."""
    return " then ".join(value for value, _ in groupby(filter(None, values)))
