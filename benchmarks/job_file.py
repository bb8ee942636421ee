"""Which jobs a cluster was given, remembered in the benchmark's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json, write_json

from .locks import locked

JOB_FILE = "jobs.json"


@dataclass
class SubmittedJobs:
    """The content of ``jobs.json``.

    Attributes:
        file: where it is; not written.
        folds: the last job that was submitted for a fold, by the job's name.
        evaluation: the job that evaluates at the end, if any.
    """

    file: Path
    folds: dict[str, str] = field(default_factory=dict)
    evaluation: str | None = None

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[SubmittedJobs]:
        """What a benchmark's folder remembers; no other process submits meanwhile.

        Raises:
            BenchmarkError: if another process does, or the file is not readable.
        """
        with locked(folder, "another masksam benchmark is submitting its jobs", 5.0, f"{JOB_FILE}.lock"):
            yield cls._read(folder / JOB_FILE)

    @classmethod
    def _read(cls, file: Path) -> SubmittedJobs:
        if not file.is_file():
            return cls(file)
        try:
            content = read_json(file)
            return cls(file, dict(content["folds"]), content["evaluation"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{file} is not readable ({error!r}); look with squeue whether jobs of this benchmark are under way, "
                "then remove it"
            ) from error

    def write(self) -> None:
        """Write atomically.

        Raises:
            BenchmarkError: if that cannot be done.
        """
        content = asdict(self)
        del content["file"]
        try:
            write_json(self.file, content)
        except OSError as error:
            raise BenchmarkError(
                f"cannot write {self.file}: {error}; jobs that SLURM has taken stay with it: make room, look with "
                "squeue, and run again"
            ) from error
