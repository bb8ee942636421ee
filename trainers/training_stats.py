"""What a training took: the content of ``training_stats.json`` in a fold's folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def training_stats(trainer: nnUNetTrainer, peak_mib: float) -> dict[str, Any]:
    """Device, memory, parameters, iterations, epochs and seconds of a training, as plain JSON.

    Args:
        trainer: at the end of its training.
        peak_mib: its highest memory, in MiB.
    """
    log = trainer.logger.get_checkpoint()
    epochs = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    parameters = list(trainer.network.parameters())
    return {
        "device": device_name(trainer.device),
        "peak_memory_mib": peak_mib,
        "peak_memory_of": "GPU allocations" if trainer.device.type == "cuda" else "process, resident",
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "iterations": trainer.current_epoch * trainer.num_iterations_per_epoch,
        "epochs": trainer.current_epoch,
        "train_seconds": float(sum(end - start for start, end in epochs)),
        "batch_size": trainer.configuration_manager.batch_size,
        "patch_size": [int(size) for size in trainer.configuration_manager.patch_size],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU cores that this process may use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def peak_memory_mib(device: torch.device) -> float:
    """This process's highest memory so far: GPU allocations on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would include the process that started this one
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) / 1024
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
