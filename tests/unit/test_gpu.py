"""What is said of a GPU that PyTorch cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from masksam_nnunet import gpu
from masksam_nnunet.errors import UsageError


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose PyTorch is built for Turing to Blackwell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])


def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    file = tmp_path / "version"
    file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Wed Oct 25\nGCC version:  gcc 12\n")
    monkeypatch.setattr(gpu, "_DRIVER", file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("version", "cuda", "named"),
    [
        ("570.86.15", "13.2", ("570.86.15", "13.2", "580")),  # too old
        ("580.65.06", "13.2", ("580.65.06", "--gpus all")),  # hidden
        ("580.65.06", None, ("without CUDA",)),
    ],
)
def test_a_gpu_that_is_there_and_not_seen_is_named(
    version: str,
    cuda: str | None,
    named: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver(tmp_path, monkeypatch, version, cuda)
    assert gpu.automatic_device() == "cpu"
    said = capsys.readouterr().err
    assert all(name in said for name in named), said


def test_without_a_gpu_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.automatic_device() == "cpu" and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((7, 0), False),
        ((6, 0), False),
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), False),
        ((12, 1), True),
    ],
)
def test_cards_that_pytorch_is_not_built_for(
    capability: tuple[int, int], fits: bool, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    trouble = gpu.gpu_trouble()
    assert (trouble is None) == fits
    assert fits or "{}.{}".format(*capability) in str(trouble)
    assert gpu.automatic_device() == ("cuda" if fits else "cpu")


def test_each_of_several_cards_is_looked_at(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0) if index else (9, 0))
    assert gpu.gpu_trouble() is None and "7.0" in str(gpu.gpu_trouble(1))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu.device_kind(d) for d in (["cpu"], ["0", "1"], ["cuda"], ["mps"])] == ["cpu", "cuda", "cuda", "mps"]
    for wrong in ([], ["cpu", "0"], ["0", "0"], ["gpu"], ["cuda", "1"]):
        with pytest.raises(UsageError, match="-device"):
            gpu.device_kind(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu, "gpu_trouble", lambda index=None: None)
    gpu.require_devices(["0"])
    with pytest.raises(UsageError, match="-device 0 1"):
        gpu.require_devices(["0", "1"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu, "gpu_trouble", lambda index=None: "an old card" if index == 1 else None)
    gpu.require_devices(["0"])
    with pytest.raises(UsageError, match="-device 0 1: an old card"):
        gpu.require_devices(["0", "1"])
