"""Whether PyTorch can use the GPU of this machine, and if not, what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import UsageError, in_short

_DRIVER = Path("/proc/driver/nvidia/version")
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""NVIDIA's driver that each CUDA needs at least (CUDA compatibility, NVIDIA's documentation)."""


def automatic_device() -> str:
    """``cuda`` if PyTorch can use a GPU, else ``cpu``; says on stderr why a GPU that is there is not used."""
    trouble = gpu_trouble()
    if trouble:
        print(f"warning: {trouble}. The CPU is used.", file=sys.stderr, flush=True)
    return "cuda" if torch.cuda.is_available() and not trouble else "cpu"


def usable_device(name: str) -> torch.device:
    """The device of that name, which ``auto`` leaves to :func:`automatic_device`.

    Raises:
        UsageError: PyTorch cannot use it.
    """
    try:
        device = torch.device(automatic_device() if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"--device {name} cannot be used ({in_short(error)}); give auto or cpu") from error
    return device


def device_kind(devices: Sequence[str]) -> str:
    """nnU-Net's name for ``-device``: ``cpu``, ``cuda`` or ``mps``. A UsageError if unknown, repeated or mixed."""
    kinds = {"cuda" if device.isdecimal() else device for device in devices}
    named_twice = len(set(devices)) < len(devices) or ("cuda" in devices and len(devices) > 1)
    if len(kinds) != 1 or kinds - {"cpu", "cuda", "mps"} or named_twice:
        given = f"-device {' '.join(devices)}".strip()
        raise UsageError(f"{given}: give cpu, mps, cuda, or different numbers of GPUs, such as -device 0 1")
    return kinds.pop()


def require_devices(devices: Sequence[str]) -> None:
    """Raise a UsageError for devices that this machine does not have, or that PyTorch cannot use."""
    kind, gpus = device_kind(devices), torch.cuda.device_count()
    for number in (int(device) if device.isdecimal() else 0 for device in devices if kind == "cuda"):
        trouble = gpu_trouble(number) if number < gpus else gpu_trouble() or f"PyTorch sees {gpus} GPUs here"
        if trouble:
            raise UsageError(f"-device {' '.join(devices)}: {trouble}; -device cpu needs none")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("-device mps: PyTorch finds none here; -device cpu always works")


def gpu_trouble(index: int | None = None) -> str | None:
    """Why PyTorch cannot use the NVIDIA GPU that is there, with the remedy; None if it can, or if there is none.

    Of several, it is the one with that number, else the one that ``cuda`` means in this process.
    """
    if torch.cuda.is_available():  # a card beside it may be for the display
        return _unfit(torch.cuda.current_device() if index is None else index)
    driver = driver_version()
    if driver is None:
        return None
    wheel = f"PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{wheel} is built without CUDA, but there is an NVIDIA driver ({driver}): install a PyTorch with CUDA"
    least = LEAST_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    if least is not None and int(driver.split(".")[0]) < least:
        return (
            f"{wheel} is built for CUDA {torch.version.cuda}, which needs NVIDIA's driver {least} or newer, and driver "
            f"{driver} is installed: update the driver, or install a PyTorch for an older CUDA (pytorch.org)"
        )
    return (
        f"{wheel} (CUDA {torch.version.cuda}) sees no GPU, but NVIDIA's driver {driver} is there: start containers "
        "with --gpus all, and check CUDA_VISIBLE_DEVICES and nvidia-smi"
    )


def driver_version() -> str | None:
    """That of NVIDIA's driver, such as 550.54.15; None where there is none."""
    text = ""
    if _DRIVER.is_file():
        text = _DRIVER.read_text(errors="replace")
    elif tool := shutil.which("nvidia-smi"):  # WSL has no such file
        try:
            text = subprocess.run([tool], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"(?:Kernel Module|Driver Version:)\D*(\d+(?:\.\d+)+)", text)
    return found[1] if found else None


def _unfit(index: int) -> str | None:
    """Why PyTorch's kernels do not run on a GPU.

    A binary runs on cards of its own major version and at least its minor; PTX code on all that are as new.
    """
    card = torch.cuda.get_device_capability(index)
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    built = [(found[1], (int(found[2]), int(found[3]))) for found in kinds if found]
    if not built or any(version <= card and (kind == "compute" or version[0] == card[0]) for kind, version in built):
        return None
    names = ", ".join(f"{major}.{minor}" for major, minor in sorted({version for _, version in built}))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {card[0]}.{card[1]}, but PyTorch "
        f"{torch.__version__} is built for {names}: install a PyTorch for another CUDA (pytorch.org; the wheels for "
        "CUDA 12.6 are the last with Pascal and Volta), or choose another card by CUDA_VISIBLE_DEVICES"
    )
