"""What is measured on a GPU runs on a CPU, in a small form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from masksam_nnunet.files import read_json

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.long
def test_the_figures_of_a_gpu_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, "figures", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("bfloat16", "float16", "kernels of attention", "training step of ViT-B", "prediction of an ACDC case"):
        assert name in done.stdout
    (plan,) = read_json(tmp_path / "memory.json")["plans"]
    assert 0.5 < plan["ratio"] < 2
    broken = subprocess.run([SCRIPT, "figures", tmp_path], env=environment | {"PYTHON": "false"}, capture_output=True)
    assert broken.returncode == 1
