"""The planner's memory estimate against what training steps really take, for a dozen plans.

    python benchmarks/performance/memory_estimate.py [--device cuda] [--out FILE.json] [--plans N] [--checkpoints]

On a GPU: bfloat16 steps and allocated memory. On a CPU: float32 steps, and growth of the process's resident peak since
before the network was built; the estimate is then made for float32 too. Neither is compared with the other.

``--checkpoints`` prints only how large a fold's checkpoint is, full and lean, with AdamW's two moments, for each SAM
(4×256×256, r = 4, N = 8, C = 1, K = 4). A file has 0.2 % more: the names.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench import device_name
from cases import training
from measure import GIVE_BACK, in_a_process, peak_mib, result
from torch import Tensor

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import dice_and_cross_entropy, training_cost
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.plans.sizing import LARGEST_FIRST

NAMES = ("backbone", "patch", "resolution", "queries", "checkpointing", "batch", "channels", "classes")
"""Queries of the paper's form; None for the dense start."""
# Of NAMES: as large as a CPU runs in a minute or two.
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
    ("vit_b", (10, 256, 224), 2, None, False, 2, 1, 4),
    ("vit_b", (16, 128, 128), 4, 8, True, 2, 4, 4),
    ("lite_medsam", (10, 256, 224), 1, None, False, 2, 1, 4),
    ("vit_l", (4, 256, 256), 4, 8, True, 2, 1, 4),
    ("vit_l", (9, 512, 512), 1, 24, True, 2, 1, 16),
    ("lite_medsam", (48, 192, 192), 1, None, True, 2, 1, 16),
    ("vit_h", (4, 256, 256), 4, None, True, 2, 1, 4),
    ("vit_h", (9, 512, 512), 1, 24, True, 2, 1, 16),
    ("vit_h", (9, 512, 512), 1, 24, False, 2, 1, 16),
]


def build(plan: list[Any]) -> tuple[MaskSAMConfig, int, int, int]:
    backbone, patch, resolution, queries, checkpointing, *sizes = plan
    form = {} if queries is None else {"num_queries": queries, "matching": "slice"}
    return MaskSAMConfig(backbone, tuple(patch), resolution, checkpointing=checkpointing, **form), *sizes


def measure(plan: list[Any], device: torch.device) -> float:
    """MiB that training steps of this plan take at most, with every class in every slice: as many targets as can be."""
    config, batch, channels, classes = build(plan)
    side = config.patch_size[-2]
    labels = (torch.arange(side) * classes // side)[:, None].expand(batch, 1, *config.patch_size)
    truth = labels.contiguous().to(torch.int16)
    return peak_mib(training(config, truth, classes, dice_and_cross_entropy, True, channels), device, steps=2)


def row(plan: list[Any], device: str) -> dict[str, Any]:
    """Estimate and measurement of one plan, the latter on a CPU in a process of its own."""
    config, batch, channels, classes = build(plan)
    precision = "bfloat16" if device == "cuda" else "float32"
    estimate = training_cost(config, channels, classes, batch, precision=precision).peak_gib
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's trainings have it
        mib = measure(plan, torch.device(device))
    else:
        mib = in_a_process(__file__, "--device", device, "--one", json.dumps(plan), **GIVE_BACK)
    measured = mib / 1024
    figures = {"estimated_gib": estimate, "measured_gib": measured, "ratio": estimate / measured}
    return dict(zip(NAMES, plan, strict=True)) | {name: round(value, 3) for name, value in figures.items()}


def for_page(plan: dict[str, Any]) -> dict[str, Any]:
    """A row for ``bench.py --merge``."""
    form = "dense start" if plan["queries"] is None else f"N = {plan['queries']}"
    saving = ", checkpointing" if plan["checkpointing"] else ""
    name = f"{plan['backbone']}, {'x'.join(map(str, plan['patch']))}, r = {plan['resolution']}, {form}{saving}"
    more = {"device": device_name("cuda"), "shapes": "batch {batch}, C = {channels}, K = {classes}".format(**plan)}
    figures = plan["estimated_gib"], plan["measured_gib"], "GiB"
    return result(f"memory of a training step, {name}", "estimated", "measured", *figures, repeats=1, **more)


def print_checkpoint_sizes() -> None:
    for backbone in reversed(LARGEST_FIRST):
        with torch.device("meta"):
            network = MaskSAM(MaskSAMConfig(backbone, (4, 256, 256), 4, 8, "slice"), 1, 4)
        moments = 2 * _bytes(p for p in network.parameters() if p.requires_grad)
        full = _bytes([*network.parameters(), *network.buffers()]) + moments
        lean = full - _bytes(x for x in network.sam_tensors().values() if not x.requires_grad)
        print(f"{backbone}: a fold {full / 1e6:,.0f} MB full, {lean / 1e6:,.0f} MB lean ({lean / full:.0%})")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="memory_estimate.json here, or memory_estimate_gpu.json")
    parser.add_argument("--plans", type=int, help="how many of them, from the first")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoints:
        print_checkpoint_sizes()
        return
    if arguments.one:
        print(measure(json.loads(arguments.one), torch.device(arguments.device)))
        return
    on_cpu = arguments.device == "cpu"
    out = arguments.out or Path(__file__).with_name("memory_estimate.json" if on_cpu else "memory_estimate_gpu.json")
    name = "cpu, float32, resident" if on_cpu else torch.cuda.get_device_name()
    rows, failed = [], 0
    for plan in (CPU_PLANS if on_cpu else GPU_PLANS)[: arguments.plans]:
        try:
            rows.append(row(list(plan), arguments.device))
        except torch.OutOfMemoryError:
            print(*plan, "does not fit")
            failed += 1
            continue
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failed += 1
            continue
        print(" ".join(f"{value!s:>10}" for value in rows[-1].values()), flush=True)
        content = {"device": name, "torch": torch.__version__, "plans": rows}
        if not on_cpu:
            content["rows"] = [for_page(one) for one in rows]
        out.write_text(json.dumps(content, indent=1) + "\n")
    worst = max((abs(r["ratio"] - 1) for r in rows), default=float("nan"))
    print(
        f"estimate / measured: worst deviation {worst:.1%} over {len(rows)} plans ({name}), {failed} without a figure"
    )


if __name__ == "__main__":
    main()
