"""Time and peak memory of steps, ours and references side by side in one run."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from masksam_nnunet.modeling.compute import keep_freed_memory

Step = Callable[[], object]
Builder = Callable[[torch.device], Step]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give memory back at once, so that a resident peak is that of what is alive."""

SHORT = 0.05
"""Seconds: steps on a GPU that take less are measured several at once."""


@dataclass(frozen=True)
class Case:
    """What is compared. The last variant is the reference of all others."""

    name: str
    shapes: str
    variants: dict[str, Builder]
    repeats: int = 5
    warm_up: bool = True
    memory: bool = True
    needs_nnunet: bool = False
    gpu_only: bool = False

    @property
    def reference(self) -> str:
        return list(self.variants)[-1]


def result(
    name: str, variant: str, against: str, ours: float, reference: float, unit: str, **more: object
) -> dict[str, Any]:
    """A row of results.json."""
    figures = {"ours": ours, "reference": reference, "ratio": ours / reference}
    rounded = {key: float(f"{value:.5g}") for key, value in figures.items()}
    return {"name": name, "variant": variant, "against": against, **rounded, "unit": unit, **more}


def in_a_process(script: str, *words: str, **environment: str) -> Any:
    """What a script prints as its last line, as JSON, run with these words."""
    done = subprocess.run(
        [sys.executable, script, *words], env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each variant; they take turns, so that a noisy moment meets all. One that fails is left out."""
    if device.type == "cpu":  # as trainings do
        keep_freed_memory()
    steps: dict[str, Step] = {}
    at_once: dict[str, int] = {}
    for name, build in case.variants.items():
        try:
            steps[name], at_once[name] = build(device), 1
            if case.warm_up:
                timed(steps[name], device)
                if device.type == "cuda":  # short steps by the dozen: the host starts them while the GPU computes
                    at_once[name] = min(50, math.ceil(SHORT / timed(steps[name], device)))
        except Exception:  # of one kernel, which this machine may lack; the others are measured all the same
            if name == case.reference:
                raise
            traceback.print_exc()
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, device, at_once[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(step: Step, device: torch.device, at_once: int = 1) -> float:
    """Seconds of a step, the mean of so many that run without a wait between them."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(at_once):
        step()
    _wait(device)
    return (time.perf_counter() - start) / at_once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mib(build: Builder, device: torch.device, steps: int = 1) -> float:
    """Peak memory from before the variant is built, weights included; a process of its own is best.

    On a CPU the process's resident peak, on a GPU what was allocated.
    """
    if device.type == "cuda":
        gc.collect()  # or what an earlier variant left is freed in between
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the resident peak
    step = build(device)
    if device.type == "cuda":
        step()  # cuDNN tries its algorithms, with all the memory that they ask for
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_peak()
    return (after - before) / 2**20


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no peak: memory is measured on Linux only")


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the precision that networks run in."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    timed(lambda: a @ a, device)
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(9))
