"""A job for executors that takes no training; imported by the processes that run it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from masksam_nnunet.errors import BenchmarkError


@dataclass(frozen=True)
class SimpleJob:
    """Notes in ``folder`` when it ran, and fails where told to."""

    folder: Path
    name: str
    fails: bool = False
    seconds: float = 0.0
    saves: float = 0.0
    """Seconds that it takes to note that it was interrupted."""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def on(self, gpu: str | None) -> SimpleJob:
        return self

    def __call__(self) -> str:
        began = time.monotonic()
        try:
            (self.folder / f"{self.name}_began").touch()
            time.sleep(self.seconds)
        except KeyboardInterrupt:
            time.sleep(self.saves)
            (self.folder / f"{self.name}_saved").touch()
            raise
        if self.fails:
            raise BenchmarkError(f"{self.name} has no data")
        (self.folder / self.name).write_text(f"{began} {time.monotonic()}")
        return "done"
