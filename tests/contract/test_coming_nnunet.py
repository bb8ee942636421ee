"""The contract tests on nnU-Net's coming release, where its source is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from nnunet_workspace import SHARED

HERE = Path(__file__).parent
TESTS = ("test_trainer", "test_planner", "test_predictor", "test_time_budget", "test_lean_checkpoints")


@pytest.mark.long
@pytest.mark.skipif(not list(SHARED.parent.glob("peers/nnUNet-main-*.tar.gz")), reason="nnU-Net's source is not here")
@pytest.mark.parametrize("name", TESTS)
def test_the_contract_holds(name: str, tmp_path: Path) -> None:
    (archive,) = SHARED.parent.glob("peers/nnUNet-main-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    code = f"import nnunetv2, sys; assert nnunetv2.__path__[0].startswith({str(folder)!r}), nnunetv2.__path__"
    run = [sys.executable, "-c", f"{code}; import pytest; sys.exit(pytest.main(['-q', {str(HERE / name)!r} + '.py']))"]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
