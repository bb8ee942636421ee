"""``make bench``: what the fast paths gain over their plain forms, and how cost grows.

    python benchmarks/performance/bench.py [--device cuda] [--only WORDS] [--repeats N] [--without-nnunet] [--page-only]

Variants take turns in one process, medians are compared; peak memory is measured in a process for each variant.
Writes results.json beside this file, docs/performance.md and its plots; figures of another device stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import growth
import torch
from cases import cases, step_flops
from measure import Case, matmul_rate, peak_mib, result, seconds
from performance_page import write_page

SHARE = "training step of the network, share of the machine's rate"
RESULTS = Path(__file__).with_name("results.json")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def all_cases(with_nnunet: bool) -> list[Case]:
    if not with_nnunet:
        return cases()
    import cases_nnunet

    return [*cases(), *cases_nnunet.cases()]


def in_a_process(*words: str, environment: dict[str, str] | None = None) -> Any:
    """What this script prints as its last line, run with these words."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: Case, device: str, repeats: int | None) -> list[dict[str, Any]]:
    """Rows of results: time and memory of every variant beside the reference."""
    number = repeats or case.repeats
    flags = ["--device", device, "--case", case.name, *([] if case.needs_nnunet else ["--without-nnunet"])]
    measured = {"s": in_a_process(*flags, "--repeats", str(number))}
    if case.memory:
        found = {name: in_a_process(*flags, "--variant", name, environment=GIVE_BACK) for name in case.variants}
        measured["MiB"] = found
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
        print(json.dumps(growth.measure(json.loads(arguments.growth), device)))
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
        found: dict[str, dict[int, dict[str, float]]] = {}
        for point in growth.points(not arguments.without_nnunet):
            axis = point["axis"]
            if arguments.only in f"growth with {axis}":
                words = ["--device", arguments.device, "--without-nnunet", "--growth", json.dumps(point)]
                measured = in_a_process(*words, environment=GIVE_BACK)
                found.setdefault(axis, {})[point[axis]] = measured
                save(growth.rows(found[axis], axis, device_name(arguments.device)))
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
