"""``make bench``: what the fast paths gain over their plain forms, and how cost grows.

    python benchmarks/performance/bench.py [--device cuda] [--only WORDS] [--repeats N] [--without-nnunet] [--page-only]

Variants take turns in one process, medians are compared; peak memory is measured in a process for each variant.
Writes results.json beside this file, docs/performance.md and its plots; figures of another device stay as they are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import blobs, cases, step_flops, training
from measure import GIVE_BACK, Builder, Case, Step, in_a_process, matmul_rate, peak_mib, result, seconds, timed
from performance_page import write_page

from masksam_nnunet.config import MaskSAMConfig

SHARE = "training step of the network, share of the machine's rate"
RESULTS = Path(__file__).with_name("results.json")
BASE = {"slices": 2, "side": 64, "queries": 8, "classes": 4}
AXES = {"slices": (1, 2, 4, 8), "side": (64, 96, 128, 160), "queries": (4, 8, 16, 32), "classes": (2, 8, 32)}
WINDOWS = (1, 2, 4, 8)


def all_cases(with_nnunet: bool) -> list[Case]:
    if not with_nnunet:
        return cases()
    import cases_nnunet

    return [*cases(), *(replace(case, needs_nnunet=True) for case in cases_nnunet.cases())]


def run_case(case: Case, device: str, repeats: int | None) -> list[dict[str, Any]]:
    """Rows of results: time and memory of every variant beside the reference."""
    number = repeats or case.repeats
    flags = ["--device", device, "--case", case.name, *([] if case.needs_nnunet else ["--without-nnunet"])]
    measured = {"s": in_a_process(__file__, *flags, "--repeats", str(number))}
    if case.memory:
        words = [__file__, *flags, "--variant"]
        measured["MiB"] = {name: in_a_process(*words, name, **GIVE_BACK) for name in case.variants}
    rows = []
    for unit, values in measured.items():
        name, times = (f"{case.name}, time", number) if unit == "s" else (f"{case.name}, peak memory", 1)
        more = {"device": device_name(device), "shapes": case.shapes, "repeats": times}
        for variant in list(case.variants)[:-1]:
            figures = values[variant], values[case.reference]
            rows.append(result(name, variant, case.reference, *figures, unit, **more))
    return rows


def device_name(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16"
    return f"CPU, {torch.get_num_threads()} threads, float32"


def shares_of_peak(measured: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """How much of the machine's own matrix-product rate, measured now, the measured training step reaches."""
    rows, where = [], torch.device(device)
    for row in measured:
        if row["name"] == f"{SHARE.split(',')[0]}, time" and row["variant"] == "ours":
            reached, rate = step_flops(where) / row["ours"] / 1e9, matmul_rate(where) / 1e9
            rows.append(row | result(SHARE, "ours", "matrix product", reached, rate, "GFLOP/s"))
    return rows


# ---- growth: of a training step with slices, in-plane size, queries and classes; of a prediction with windows --------


def _training_step(slices: int, side: int, queries: int, classes: int) -> Builder:
    config = MaskSAMConfig("vit_b", (slices, side, side), 4, queries, "slice")
    return training(config, blobs(2, slices, side, classes), classes)


def _windows(windows: int) -> Builder:
    """``masksam predict`` on a volume of so many windows, which overlap by half a patch."""
    from cases_nnunet import PATCH, prediction, tiny

    depth, *plane = PATCH
    return prediction(tiny, True, (depth + (windows - 1) * depth // 2, *plane))


def measure_point(sizes: dict[str, int], device: torch.device) -> dict[str, float]:
    """Seconds and peak MiB: the better of two, after a first one."""
    took: list[float] = []
    build = _windows(**sizes) if "windows" in sizes else _training_step(**sizes)

    def recorded(device: torch.device) -> Step:
        step = build(device)
        return lambda: took.append(timed(step, device))

    mib = peak_mib(recorded, device, steps=3)
    return {"s": min(took[1:]), "MiB": mib}


def run_growth(axis: str, values: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    """As the other results, for all points of an axis; the reference is the smallest of them."""
    base = BASE if axis in AXES else {}
    others = ", ".join(f"{name} {value}" for name, value in base.items() if name != axis)
    shapes = f"ViT-B, r = 4, batch 2, {others}" if base else "tiny, patch 8x128x128, eight mirrors"
    words = [__file__, "--device", device, "--growth"]
    found = {value: in_a_process(*words, json.dumps(base | {axis: value}), **GIVE_BACK) for value in values}
    first, more = values[0], {"device": device_name(device), "shapes": shapes, "repeats": 2}
    return [
        result(f"growth with {axis}, {what}", str(value), str(first), one[unit], found[first][unit], unit, **more)
        for unit, what in (("s", "time"), ("MiB", "peak memory"))
        for value, one in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--without-nnunet", action="store_true", help="cases that need no nnU-Net")
    parser.add_argument("--page-only", action="store_true", help="write docs/performance.md from the results again")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.growth:
        print(json.dumps(measure_point(json.loads(arguments.growth), device)))
        return
    if arguments.case:
        (case,) = (case for case in all_cases(not arguments.without_nnunet) if case.name == arguments.case)
        if arguments.variant:
            print(json.dumps(peak_mib(case.variants[arguments.variant], device)))
        else:
            print(json.dumps(seconds(case, device, arguments.repeats)))
        return

    if not arguments.page_only:
        for case in all_cases(not arguments.without_nnunet):
            if arguments.only in case.name and not (case.gpu_only and arguments.device == "cpu"):
                rows = run_case(case, arguments.device, arguments.repeats)
                save(rows + shares_of_peak(rows, arguments.device))
        for axis, values in (AXES | ({} if arguments.without_nnunet else {"windows": WINDOWS})).items():
            if arguments.only in f"growth with {axis}":
                save(run_growth(axis, values, arguments.device))
    write_page(json.loads(RESULTS.read_text()))


def save(rows: list[dict[str, Any]]) -> None:
    """Print rows, and put them in the place of earlier ones of the same name, variant and device."""
    for row in rows:
        values = f"{row['ours']:>10} {row['reference']!s:>10} {row['unit']:>8} x {row['ratio']}"
        print(f"{row['name']:<55} {row['variant']:<24} {values}", flush=True)
    new = {(row["name"], row["variant"], row["device"]): row for row in rows}
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    merged = [new.pop((row["name"], row["variant"], row["device"]), row) for row in earlier]
    RESULTS.write_text(json.dumps([*merged, *new.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
