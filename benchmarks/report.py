"""The report: a self-contained HTML page, the same as JSON and CSV, and the tables in Markdown for a supplement."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import write_json, write_text_atomically
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.report.figures import colour_of, style_of
from masksam_nnunet.inference.report.html import environment, plain

from . import tables
from .plots import draw_boxes, draw_cases, draw_curves, draw_differences
from .results import METRICS, BenchmarkResults
from .tables import Bold, Table

PAGE = "report.html"
SCHEMA_VERSION = 2
"""Rises when a field of report.json changes its meaning or goes."""

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")


def write_report(results: BenchmarkResults, out: Path) -> Path:
    """Write the page and its companions into the folder ``out``, each file whole or not at all; the path of the page.

    Raises:
        UsageError: the folder cannot be written.
    """
    # Everything is made before anything is written: a fault leaves an older report as it was.
    content = to_json(results)
    frames = {"scores": results.scores, "aggregates": results.means, "comparisons": results.comparisons}
    texts = {f"{name}.csv": frame.to_csv(index=False, lineterminator="\n") for name, frame in frames.items()}
    texts |= {"supplement.md": to_markdown(results), PAGE: render(results)}
    try:
        write_json(out / "report.json", content)
        for name, text in texts.items():
            write_text_atomically(out / name, text)
    except OSError as error:
        raise UsageError(
            f"the report cannot be written to {out}: {error}; make room, then run masksam report"
        ) from error
    return out / PAGE


def to_json(results: BenchmarkResults) -> dict[str, Any]:
    """The results by the field names of :class:`BenchmarkResults`, without pictures; NaN becomes None.

    ``scores`` and ``test_set``, which may be long, are dicts of ``columns`` and ``data``; other tables are lists of
    dicts.
    """
    content: dict[str, Any] = {"schema": "masksam-benchmark", "schema_version": SCHEMA_VERSION}
    for name in (field.name for field in fields(results) if field.name != "inside"):
        value = getattr(results, name)
        if isinstance(value, pd.DataFrame):
            is_long = name in ("scores", "test_set")
            value = value.to_dict("split", index=False) if is_long else value.to_dict("records")
        content[name] = plain(value)
    return content


def render(results: BenchmarkResults) -> str:
    """The HTML page: everything inline, nothing fetched from elsewhere, no script."""
    classes = Classes.from_dataset_json(results.dataset_json)
    page = environment().get_template("benchmark.html.j2")
    return page.render(
        results=results,
        metrics=METRICS,
        tables=tables,
        severe=[finding.text for finding in results.findings if finding.severe],
        statements=[finding.text for finding in results.findings if not finding.severe],
        class_colours=colour_of(classes),
        class_styles=style_of(classes),
        boxes=draw_boxes(results),
        differences=draw_differences(results),
        curves=draw_curves(results),
        cases=draw_cases(results),
    )


# ---- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(results: BenchmarkResults) -> str:
    """The supplement: scores, scores by class, comparisons, test set, and what they mean."""
    made = environment()
    made.filters |= {"md": lambda text: Markup(escape(text)), "md_table": lambda table: Markup(_table(table))}
    text = made.get_template("supplement.md.j2").render(results=results, metrics=METRICS, tables=tables)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape(text: str) -> str:
    """Put ``text`` on one line, with nothing in it that Markdown or HTML would take for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _table(table: Table) -> str:
    if not table.groups:
        return "No rows were compared."
    width = len(table.heads)
    lines = [[escape(head) for head in table.heads], [":--", *["--:"] * (width - 1)]]
    for title, group in table.groups.items():
        if title:
            lines.append([f"**{escape(title)}**", *[""] * (width - 1)])
        lines += [[_cell(cell) for cell in line] for line in group]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(cell: str) -> str:
    first, *notes = map(escape, cell.split("\n"))
    return " ".join([f"**{first}**" if isinstance(cell, Bold) and first else first, *notes])
