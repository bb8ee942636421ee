"""Checkpoints are read as tensors and plain values; one that would run code is refused, and nothing of it is run."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import CheckpointError


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def content(**more: Any) -> dict[str, Any]:
    """As nnU-Net's trainer saves it, numpy's numbers included."""
    return {
        "network_weights": OrderedDict(a=torch.randn(2, 3), b=torch.ones(4, dtype=torch.bfloat16)),
        "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)], "lrs": [0.1], "dice": [np.ones(2), [np.nan]]},
        "_best_ema": np.float32(0.75),
        "current_epoch": np.int64(3),
        "init_args": {"fold": 0, "device": torch.device("cpu"), "flag": np.bool_(True)},
        "inference_allowed_mirroring_axes": (0, 1),
        **more,
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_all_that_a_trainer_saves_comes_back(new_format: bool, tmp_path: Path) -> None:
    saved = content()
    torch.save(saved, tmp_path / "c.pth", _use_new_zipfile_serialization=new_format)
    loaded = load_checkpoint(tmp_path / "c.pth")
    for name, value in saved["network_weights"].items():
        assert torch.equal(loaded["network_weights"][name], value)
    assert loaded["logging"]["train_losses"] == [0.5, 0.25] and loaded["_best_ema"] == np.float32(0.75)
    assert loaded["logging"]["dice"][0].tolist() == [1, 1]
    assert loaded["inference_allowed_mirroring_axes"] == (0, 1) and loaded["init_args"] == saved["init_args"]


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_refused_and_not_run(new_format: bool, tmp_path: Path) -> None:
    file, made = tmp_path / "c.pth", tmp_path / "made"
    torch.save(content(logging={"lrs": Hostile(made)}), file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_checkpoint(file)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "the file was harmless: the test shows nothing"


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    with pytest.raises(CheckpointError, match=str(file)):
        load_checkpoint(file)
    torch.save(content(), file)
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[:500], whole[:-200], whole[:900] + b"\0" * 400 + whole[1300:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(file)):
            load_checkpoint(file)
    for other in ([1, 2], {"weights": torch.ones(1)}, content(network_weights=[torch.ones(1)])):
        torch.save(other, file)
        with pytest.raises(CheckpointError, match=str(file)):
            load_checkpoint(file)
