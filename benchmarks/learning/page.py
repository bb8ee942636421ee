"""The tables of docs/learning.md, from results.jsonl, which variants.py writes.

python benchmarks/learning/page.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from variants import RESULTS, VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "learning.md"
BEGIN, END = "<!-- measured: written by benchmarks/learning/page.py -->", "<!-- end of what page.py writes -->"


def tables(results: pd.DataFrame) -> str:
    """One table for each dataset, fold and number of iterations; the best variant comes first."""
    parts = []
    for (data, fold, iterations), rows in results.groupby(["data", "fold", "iterations"]):
        parts.append(f"### {data}, fold {fold}, {iterations} iterations\n")
        parts.append("| variant | what differs | r | mean Dice | classes | runs |\n|---|---|---|--:|---|--:|")
        groups = rows.groupby(["variant", "also", "resolution"])
        for (variant, also, resolution), runs in sorted(groups, key=lambda group: -group[1]["dice"].mean()):
            classes = pd.DataFrame(list(runs["classes"])).mean()
            text = "; ".join(filter(None, (VARIANTS[variant].text, also)))
            shown = ", ".join(f"{value:.3f}" for value in classes)
            r = "–" if variant.startswith("nnunet") else f"{resolution:g}"
            runs = runs.sort_values("seed")
            each = f" ({', '.join(f'{dice:.3f}' for dice in runs['dice'])})" if len(runs) > 1 else ""
            parts.append(f"| `{variant}` | {text} | {r} | {runs['dice'].mean():.3f}{each} | {shown} | {len(runs)} |")
        parts.append("")
    return "\n".join(parts)


def page_text() -> str:
    """The page, with its tables from the results."""
    before, rest = PAGE.read_text().split(BEGIN)
    results = pd.read_json(RESULTS, lines=True, dtype={"seed": int})
    written = tables(results.fillna({"also": ""}))  # what else differed, in the runs of an earlier state of the code
    return f"{before}{BEGIN}\n\n{written}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_text())
