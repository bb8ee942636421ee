"""``make bench``: what the fast paths gain over their plain forms, and how cost grows.

    python benchmarks/performance/bench.py [--device cuda] [--gpu] [--only PATTERN] [--repeats N] [--page-only]
    python benchmarks/performance/bench.py --merge FILE...

Variants take turns in one process, medians are compared; peak memory is measured in a process for each variant, or on a
GPU by its allocator. Writes results.json beside this file, docs/performance.md and its plots; figures of another device
stay as they are. ``--gpu`` runs only what a GPU is needed for; on a CPU in a small form, once unless ``--repeats`` is
given.
"""

from __future__ import annotations

import argparse
import json
import re
import traceback
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


def gpu_cases(device: str) -> list[Case]:
    import cases_gpu

    return cases_gpu.cases(cases_gpu.SMALL if device == "cpu" else cases_gpu.Sizes())


def run_case(case: Case, device: str, repeats: int | None) -> list[dict[str, Any]]:
    """Rows of results: time and memory of every variant beside the reference."""
    number = repeats or case.repeats
    measured = _on_a_gpu(case, number) if device == "cuda" else _in_processes(case, device, number)
    rows = []
    for unit, values in measured.items():
        name, times = (f"{case.name}, time", number) if unit == "s" else (f"{case.name}, peak memory", 1)
        more = {"device": device_name(device), "shapes": case.shapes, "repeats": times}
        for variant in list(values)[:-1] if case.reference in values else ():
            figures = values[variant], values[case.reference]
            rows.append(result(name, variant, case.reference, *figures, unit, **more))
    return rows


def _on_a_gpu(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # as nnU-Net sets it
    measured = {"s": seconds(case, device, repeats)}
    if case.memory:
        measured["MiB"] = {}
        for name in measured["s"]:
            try:
                measured["MiB"][name] = peak_mib(case.variants[name], device, steps=2)
            except torch.OutOfMemoryError:  # the times are kept
                traceback.print_exc()
    return measured


def _in_processes(case: Case, device: str, number: int) -> dict[str, dict[str, float]]:
    flags = ["--device", device, "--case", case.name, *([] if case.needs_nnunet else ["--without-nnunet"])]
    measured = {"s": in_a_process(__file__, *flags, "--repeats", str(number))}
    if case.memory:
        words = [__file__, *flags, "--variant"]
        measured["MiB"] = {name: in_a_process(*words, name, **GIVE_BACK) for name in measured["s"]}
    return measured


def device_name(device: str) -> str:
    if device == "cuda":
        formats = "steps in bfloat16 (nnU-Net's in float16), predictions in float16"
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {formats}"
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
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--without-nnunet", action="store_true", help="cases that need no nnU-Net")
    parser.add_argument("--gpu", action="store_true", help="what a GPU is needed for; on a CPU in a small form")
    parser.add_argument("--page-only", action="store_true", help="write docs/performance.md from the results again")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=(), help="take over rows of such files, measure nothing"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.growth:
        print(json.dumps(measure_point(json.loads(arguments.growth), device)))
        return
    chosen = gpu_cases(arguments.device) if arguments.gpu else all_cases(not arguments.without_nnunet)
    if arguments.case:
        (case,) = (case for case in chosen if case.name == arguments.case)
        if arguments.variant:
            print(json.dumps(peak_mib(case.variants[arguments.variant], device)))
        else:
            print(json.dumps(seconds(case, device, arguments.repeats)))
        return

    if arguments.gpu and arguments.device == "cpu":
        for case in chosen:
            if re.search(arguments.only, case.name):
                timed_well = arguments.repeats is not None  # else it is only seen to run
                print(case.name, seconds(replace(case, warm_up=timed_well), device, arguments.repeats or 1), flush=True)
        return
    failed = []
    for file in arguments.merge:
        content = json.loads(file.read_text())
        save(content["rows"] if isinstance(content, dict) else content)  # memory_estimate.py writes more than rows
    if not arguments.page_only and not arguments.merge:
        for case in chosen:
            if re.search(arguments.only, case.name) and not (case.gpu_only and arguments.device == "cpu"):
                try:
                    rows = run_case(case, arguments.device, arguments.repeats)
                    save(rows)
                    save(shares_of_peak(rows, arguments.device))
                except Exception:  # the others are measured all the same: a GPU may be there for minutes only
                    traceback.print_exc()
                    failed.append(case.name)
        for axis, values in (AXES | ({} if arguments.without_nnunet else {"windows": WINDOWS})).items():
            if re.search(arguments.only, f"growth with {axis}") and not arguments.gpu:
                save(run_growth(axis, values, arguments.device))
    write_page(json.loads(RESULTS.read_text()))
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        values = f"{row['ours']:>10} {row['reference']!s:>10} {row['unit']:>8} x {row['ratio']}"
        print(f"{row['name']:<55} {row['variant']:<36} {values}", flush=True)


def save(rows: list[dict[str, Any]]) -> None:
    """Print rows, and put them in the place of earlier ones of the same name, variant and device."""
    show(rows)
    new = {(row["name"], row["variant"], row["device"]): row for row in rows}
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    merged = [new.pop((row["name"], row["variant"], row["device"]), row) for row in earlier]
    RESULTS.write_text(json.dumps([*merged, *new.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
