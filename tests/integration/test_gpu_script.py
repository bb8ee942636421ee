"""What is measured on a GPU runs on a CPU, in a small form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases_gpu
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from masksam_nnunet.files import read_json
from masksam_nnunet.modeling.attention import fused_attention

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def test_flex_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, without a compiler; it has no backward pass on a CPU."""
    monkeypatch.setattr(cases_gpu, "_compiled_flex", flex_attention)
    torch.manual_seed(0)
    qkv, rows, columns = torch.randn(2, 20, 3, 2, 8), torch.randn(4, 4, 8), torch.randn(5, 5, 8)
    with torch.no_grad():
        given = qkv, rows, columns, 8**-0.5
        torch.testing.assert_close(cases_gpu._flex(*given), fused_attention(*given).transpose(1, 2))


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
