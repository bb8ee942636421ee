"""How time and peak memory grow: of a training step with slices, in-plane size, queries and classes; of a prediction
with the number of windows."""

from __future__ import annotations

from typing import Any

import torch
from cases import blobs, training
from measure import Builder, Step, peak_mib, result, timed

from masksam_nnunet.config import MaskSAMConfig

BASE = {"slices": 2, "side": 64, "queries": 8, "classes": 4}
AXES = {"slices": (1, 2, 4, 8), "side": (64, 96, 128, 160), "queries": (4, 8, 16, 32), "classes": (2, 8, 32)}
WINDOWS = (1, 2, 4, 8)
UPSAMPLE = 4


def points(with_nnunet: bool) -> list[dict[str, Any]]:
    """What is varied, and all sizes, for each measurement."""
    found = [{"axis": axis, **BASE, axis: value} for axis, values in AXES.items() for value in values]
    return found + [{"axis": "windows", "windows": number} for number in WINDOWS if with_nnunet]


def measure(point: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds and peak MiB: the better of two, after a first one."""
    took: list[float] = []
    build = _windows(point["windows"]) if point["axis"] == "windows" else _training(point)

    def recorded(device: torch.device) -> Step:
        step = build(device)
        return lambda: took.append(timed(step, device))

    mib = peak_mib(recorded, device, steps=3)
    return {"s": min(took[1:]), "MiB": mib}


def _training(point: dict[str, Any]) -> Builder:
    """Network and loss."""
    config = MaskSAMConfig("vit_b", (point["slices"], point["side"], point["side"]), UPSAMPLE, point["queries"])
    return training(config, blobs(2, point["slices"], point["side"], point["classes"]), point["classes"])


def _windows(number: int) -> Builder:
    """``masksam predict`` on a volume of so many windows, which overlap by half a patch."""
    from cases_nnunet import PATCH, prediction, tiny

    depth, *plane = PATCH
    return prediction(tiny, True, (depth + (number - 1) * depth // 2, *plane))


def rows(found: dict[int, dict[str, float]], axis: str, device: str) -> list[dict[str, Any]]:
    """As the other results, for all points of an axis; the reference is the smallest of them."""
    shapes = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != axis)
    shapes = f"ViT-B, u = 4, batch 2, {shapes}" if axis in AXES else "tiny, patch 8x128x128, eight mirrors"
    smallest, more = min(found), {"device": device, "shapes": shapes, "repeats": 2}
    rows = []
    for unit, what in (("s", "time"), ("MiB", "peak memory")):
        for value in sorted(found):
            figures = found[value][unit], found[smallest][unit]
            rows.append(result(f"growth with {axis}, {what}", str(value), str(smallest), *figures, unit, **more))
    return rows
