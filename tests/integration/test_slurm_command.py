"""The grid on a real SLURM of one node, where it is installed: tests/slurm/run.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "slurm" / "run.sh"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: Debian's packages slurm-wlm and munge"),
]


def test_a_grid_on_slurm_survives_preemption_requeueing_and_kill() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASKSAM_", "nnUNet_", "SLURM_"))}
    if "MASKSAM_TEST_DATA" in os.environ:
        environment["MASKSAM_TEST_DATA"] = os.environ["MASKSAM_TEST_DATA"]
    done = subprocess.run([SCRIPT, sys.executable], env=environment, capture_output=True, text=True, timeout=1750)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert "complete: 4 folds, 3 of them broken off and continued" in done.stdout
