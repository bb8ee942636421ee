"""How time and peak memory of a training step grow with slices, in-plane size, queries and classes."""

from __future__ import annotations

from typing import Any

import torch
from cases import blobs, training
from measure import Step, peak_mib, timed

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import training_cost

BASE = {"slices": 2, "side": 64, "queries": 8, "classes": 4}
AXES = {"slices": (1, 2, 4, 8), "side": (64, 96, 128, 160), "queries": (4, 8, 16, 32), "classes": (2, 8, 32)}
UPSAMPLE = 4


def points() -> list[dict[str, Any]]:
    """What is varied, and all sizes, for each measurement."""
    return [{"axis": axis, **BASE, axis: value} for axis, values in AXES.items() for value in values]


def measure(point: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds and peak MiB of a step of network and loss, ViT-B, u = 4, batch 2."""
    config = MaskSAMConfig("vit_b", (point["slices"], point["side"], point["side"]), UPSAMPLE, point["queries"])
    took: list[float] = []

    def build(device: torch.device) -> Step:
        truth = blobs(2, point["slices"], point["side"], point["classes"])
        step = training(config, truth, point["classes"])(device)
        return lambda: took.append(timed(step, device))

    mib = peak_mib(build, device, steps=3)
    return {"seconds": sorted(took[1:])[0], "mib": mib}


def row(point: dict[str, Any], found: dict[str, float], device: str) -> dict[str, Any]:
    """As the other results: ``ours`` is seconds, ``reference`` peak MiB, for plots."""
    axis = point["axis"]
    return {
        "name": f"growth with {axis}",
        "variant": str(point[axis]),
        "against": "",
        "ours": round(found["seconds"], 3),
        "reference": round(found["mib"]),
        "ratio": None,
        "unit": "s, MiB",
        "device": device,
        "shapes": ", ".join(f"{name} {point[name]}" for name in BASE) + ", ViT-B, u = 4, batch 2",
        "repeats": 2,
    }


def step_flops(slices: int, side: int, queries: int, device: torch.device) -> int:
    """Operations of forward and backward pass of the network and its loss, batch 1, as this device runs them."""
    config = MaskSAMConfig("vit_b", (slices, side, side), UPSAMPLE, queries)
    return training_cost(config, 1, 4, 1, precision="bfloat16" if device.type == "cuda" else "float32").flops
