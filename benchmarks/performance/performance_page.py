"""docs/performance.md and its plots, from benchmarks/performance/results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- measured: written by make bench -->", "<!-- end of what make bench writes -->"
AXES = {
    "slices": "slices D",
    "side": "patch side (SAM input is 4 times that)",
    "queries": "queries N",
    "classes": "classes K",
    "windows": "windows of a prediction",
}


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put tables and plots between the marks of the page."""
    page = DOCS / "performance.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        of_device = [row for row in rows if row["device"] == device]
        grown = [row for row in of_device if row["name"].startswith("growth")]
        parts.append(f"## {device}\n\n{_table([row for row in of_device if row not in grown])}")
        if grown:
            name = f"growth_{device.split(',')[0].replace(' ', '_').lower()}.png"
            _plot(grown, DOCS / name)
            shapes = "ViT-B, r = 4, batch 2; else 2 slices of 64x64, N = 8, K = 4"
            parts.append(
                f"Time and peak memory of a training step with its loss ({shapes}), and of `masksam predict` "
                f"(tiny, windows of 8x128x128, eight mirrors):\n\n![growth]({name})\n"
            )
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| what | shapes | this | against | this | that | ratio | repeats |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        values = f"{_number(row['ours'], row['unit'])} | {_number(row['reference'], row['unit'])}"
        lines.append(
            f"| {row['name']} | {row['shapes']} | {row['variant']} | {row['against']} | {values} | "
            f"{row['ratio']:.2f} | {row['repeats']} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float, unit: str) -> str:
    if not unit:  # of the agreement of number formats
        return f"{value:.4f}"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    figure, panels = plt.subplots(1, len(AXES), figsize=(17, 3.2), layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        time, memory = (_points(rows, f"growth with {axis}, {what}") for what in ("time", "peak memory"))
        panel.plot(time.keys(), time.values(), "o-", color="tab:blue")
        panel.set(xlabel=label, ylim=(0, None), xlim=(0, None))
        panel.set_ylabel("seconds", color="tab:blue")
        other = panel.twinx()
        other.plot(memory.keys(), [mib / 1024 for mib in memory.values()], "s--", color="tab:red")
        other.set_ylim(0, None)
        other.set_ylabel("peak GiB", color="tab:red")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _points(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    return dict(sorted((int(row["variant"]), row["ours"]) for row in rows if row["name"] == name))
