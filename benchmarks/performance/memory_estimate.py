"""The planner's memory estimate against what training steps really take, for a dozen plans.

    python benchmarks/performance/memory_estimate.py [--device cuda] [--out benchmarks/performance/memory_estimate.json]

On a GPU: bfloat16 steps, ``torch.cuda.max_memory_allocated`` after a warm-up step. On a CPU: float32 steps, growth of
the process's resident peak since before the network was built (each plan in a process of its own, glibc told to give
memory back at once); the estimate is then made for float32 too. Neither is compared with the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import dice_and_cross_entropy, training_cost
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.compute import autocast

# backbone, patch, u, N, checkpointing, batch, C, K: as large as a CPU runs in a minute or two.
CPU_PLANS = [
    ("vit_b", (4, 64, 64), 4, 8, False, 2, 1, 4),
    ("vit_b", (4, 64, 64), 4, 8, True, 2, 1, 4),
    ("vit_b", (2, 128, 128), 4, 8, False, 1, 1, 4),
    ("vit_b", (8, 128, 96), 2, 8, True, 1, 3, 4),
    ("vit_b", (2, 256, 256), 2, 16, True, 1, 1, 9),
    ("vit_b", (1, 512, 512), 1, 24, True, 1, 1, 16),  # batch 1: PyTorch's CPU then unfolds its 3D convolutions
    ("vit_b", (1, 512, 512), 1, 24, True, 2, 1, 16),
    ("vit_l", (4, 64, 64), 4, 8, False, 1, 1, 4),
    ("vit_l", (4, 64, 64), 4, 8, True, 1, 1, 4),
    ("vit_l", (2, 128, 160), 2, 24, True, 1, 1, 16),
    ("vit_h", (2, 64, 64), 4, 8, False, 1, 1, 4),
    ("vit_h", (2, 96, 128), 4, 24, True, 1, 1, 14),
    ("vit_h", (2, 128, 128), 2, 8, True, 1, 2, 4),
]
GPU_PLANS = [
    ("vit_b", (4, 256, 256), 4, 8, False, 2, 1, 4),
    ("vit_b", (4, 256, 256), 4, 8, True, 2, 1, 4),
    ("vit_b", (20, 256, 224), 4, 8, True, 2, 1, 4),
    ("vit_b", (10, 256, 224), 2, 8, False, 2, 1, 4),
    ("vit_b", (16, 128, 128), 4, 8, True, 2, 4, 4),
    ("vit_b", (48, 192, 192), 1, 24, True, 2, 1, 16),
    ("vit_l", (4, 256, 256), 4, 8, True, 2, 1, 4),
    ("vit_l", (9, 512, 512), 1, 24, True, 2, 1, 16),
    ("vit_l", (8, 160, 192), 4, 16, True, 2, 2, 9),
    ("vit_h", (4, 256, 256), 4, 8, True, 2, 1, 4),
    ("vit_h", (9, 512, 512), 1, 24, True, 2, 1, 16),
    ("vit_h", (9, 512, 512), 1, 24, False, 2, 1, 16),
]


def build(plan: list[Any]) -> tuple[MaskSAMConfig, int, int, int]:
    backbone, patch, upsample, queries, checkpointing, *sizes = plan
    return MaskSAMConfig(backbone, tuple(patch), upsample, queries, checkpointing=checkpointing), *sizes


def measure(plan: list[Any], device: torch.device) -> int:
    """Bytes that training steps of this plan take at most."""
    config, batch, channels, classes = build(plan)
    before = psutil.Process().memory_info().rss
    network = MaskSAM(config, channels, classes).train().to(device)
    criterion = MaskSAMCriterion(config.loss, network.grid, classes, semantic_loss=dice_and_cross_entropy)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    x = torch.randn(batch, channels, *config.patch_size, device=device)
    # Every class in every slice, as many targets as there can be.
    labels = torch.arange(config.patch_size[-2], device=device) * classes // config.patch_size[-2]
    target = labels[:, None].expand(batch, 1, *config.patch_size).contiguous().to(torch.int16)
    for step in range(2):
        if device.type == "cuda" and step == 1:
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            output = network(x)
        loss, _ = criterion(output, target)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 12.0)
        optimizer.step()
        del output, loss
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def row(plan: list[Any], device: str) -> dict[str, Any]:
    """Estimate and measurement of one plan, the latter in a process of its own."""
    config, batch, channels, classes = build(plan)
    precision = "bfloat16" if device == "cuda" else "float32"
    estimate = training_cost(config, channels, classes, batch, precision=precision)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--device", device, "--one", json.dumps(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = int(done.stdout.split()[-1])
    names = ("backbone", "patch", "upsample", "queries", "checkpointing", "batch", "channels", "classes")
    return dict(zip(names, plan, strict=True)) | {
        "estimated_gib": round(estimate.peak_gib, 3),
        "measured_gib": round(measured / 2**30, 3),
        "ratio": round(estimate.peak_bytes / measured, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(json.loads(arguments.one), torch.device(arguments.device)))
        return
    plans = CPU_PLANS if arguments.device == "cpu" else GPU_PLANS
    rows = []
    for plan in plans:
        rows.append(row(list(plan), arguments.device))
        print(" ".join(f"{value!s:>10}" for value in rows[-1].values()), flush=True)
    name = "cpu, float32, resident" if arguments.device == "cpu" else torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "plans": rows}, indent=1) + "\n")
    worst = max(abs(r["ratio"] - 1) for r in rows)
    print(f"estimate / measured: worst deviation {worst:.1%} over {len(rows)} plans ({name})")


if __name__ == "__main__":
    main()
