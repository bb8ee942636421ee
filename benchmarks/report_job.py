"""The evaluation at the end of a cluster's grid. Imports nothing heavy: nnU-Net reads its variables when imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from masksam_nnunet.errors import BenchmarkError


@dataclass(frozen=True)
class ReportJob:
    """Runs ``masksam report`` on a benchmark's folder."""

    folder: Path

    def __call__(self) -> str:
        """The report's path.

        Raises:
            BenchmarkError: what the command says when it fails.
        """
        command = [sys.executable, "-m", "masksam_nnunet.cli.app", "report", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, flush=True)
        print(done.stderr, file=sys.stderr, flush=True)
        if done.returncode:
            raise BenchmarkError(f"masksam report {self.folder} failed:\n{done.stderr.strip()}")
        return done.stdout.splitlines()[-1]
