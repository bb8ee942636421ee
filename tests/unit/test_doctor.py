"""``masksam doctor``: what it finds where all is well, and each trouble by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from masksam_nnunet import gpu
from masksam_nnunet.cli import doctor
from masksam_nnunet.cli.app import app
from masksam_nnunet.environment import EXT_TRAINER, RANDOM_INIT, ext_trainer_value
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.trainers import loading


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which a training can start, without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "driver_version", lambda: None)
    for name in doctor.FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv(EXT_TRAINER, ext_trainer_value(None))
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setattr(doctor, "PATCH", (2, 32, 32))


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_step", lambda _: iter(()))


def seen(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")])
def test_a_machine_that_can_train(arguments: tuple[str, ...]) -> None:
    code, said = seen(*arguments)
    assert code == 0 and "PROBLEM" not in said
    assert ("-device cpu" in said) == (not arguments), "what masksam train needs here"
    for name in (*doctor.FOLDERS, "torch", "nnunetv2", "GPU", "lite_medsam", "s for a step"):
        assert name in said


@pytest.mark.usefixtures("without_training")
@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_folder_that_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    code, said = seen()
    assert code == 1
    (problem,) = (line for line in said.splitlines() if "PROBLEM" in line)
    assert name in problem


@pytest.mark.usefixtures("without_training")
def test_trainers_that_nnunet_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXT_TRAINER)
    code, said = seen()
    assert code == 0  # of masksam train
    (note,) = (line for line in said.splitlines() if "note" in line)
    assert "masksam env" in note


@pytest.mark.usefixtures("without_training")
def test_folders_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "gone"))
    assert seen()[0] == 1
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "gone"))  # a training does not need it
    code, said = seen()
    assert code == 0 and "note" in said and str(tmp_path / "gone") in said


@pytest.mark.usefixtures("without_training")
def test_weights_that_are_named_and_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CHECKPOINTS", {})
    code, said = seen()
    assert code == 1 and "masksam weights" in said
    monkeypatch.setenv(RANDOM_INIT, "1")
    assert seen()[0] == 0


@pytest.mark.usefixtures("without_training")
def test_another_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "9.9" if name == "nnunetv2" else actual(name))
    code, said = seen()
    assert code == 1 and "9.9" in said and "nnunetv2<3,>=2.8" in said
    monkeypatch.setattr(doctor, "version", lambda name: "2.99" if name == "nnunetv2" else actual(name))
    code, said = seen()
    assert code == 0 and "2.99" in said and "not tested" in said


@pytest.mark.usefixtures("without_training")
def test_too_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20, total=64 * 2**20))
    monkeypatch.setenv("nnUNet_n_proc_DA", "12")
    code, said = seen()
    assert code == 1 and "--shm-size" in said


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the wheel is built for, most of whose memory is taken, and a cuDNN without 3D convolutions."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "Card",
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_75", "sm_90"],
        "mem_get_info": (2**30, 2**36),
        "is_bf16_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(gpu, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(doctor, "_kernel", lambda *_: "flash attention")


@pytest.mark.usefixtures("without_training", "card")
def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = seen()
    assert code == 0 and "PROBLEM" not in said and "A training can start." in said
    for name in ("580.65.06", "capability 9.0", "1.0 GiB of 64.0 GiB", "cuda, bfloat16", "flash attention"):
        assert name in said
    assert "nvidia-cudnn-cu13" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    code, said = seen()
    assert code == 1 and "7.0" in said, "the wheel has no kernels for it"
    assert seen("--device", "cpu")[0] == 0


def test_a_step_that_fails_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(MaskSAMCriterion, "__call__", broken)
    code, said = seen()
    assert code == 1 and "no kernel image" in said
    assert seen("--device", "mps")[0] == 2
