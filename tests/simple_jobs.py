"""A fold that takes no training."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from masksam_nnunet.benchmarks.jobs import FoldJob
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.inference.methods import ModelName


@dataclass(frozen=True)
class SimpleJob(FoldJob):
    """Notes in its folder when it ran, and fails where told to."""

    fails: bool = False

    def run(self, gpu: str | None = None, stop: threading.Event | None = None) -> None:
        began = time.monotonic()
        time.sleep(0.3)
        if self.fails:
            raise TrainingError(f"{self.name} has no data")
        self.folder.mkdir(parents=True)
        (self.folder / "ran").write_text(f"{began} {time.monotonic()} {gpu}")


def simple_jobs(root: Path, *trainers: str, failing: str = "") -> list[SimpleJob]:
    """A job for each trainer, in ``root``."""
    environment = {"nnUNet_results": str(root), "nnUNet_preprocessed": str(root)}
    return [SimpleJob("D", ModelName(t, "P", "2d"), 0, "cpu", environment, fails=t == failing) for t in trainers]
