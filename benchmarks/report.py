"""The benchmark's report: an HTML page, the same as JSON and CSV, and a paper's supplement in Markdown."""

from __future__ import annotations

from pathlib import Path

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import write_json, write_text_atomically
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.report.figures import colour_of, style_of
from masksam_nnunet.inference.report.html import environment

from .compute_table import HEADS, all_hours, compute_groups
from .lookup import Lookup
from .markdown import to_markdown
from .metric_styles import STYLES
from .pictures import Pictures, draw_pictures
from .report_csv import aggregates_csv, comparisons_csv
from .report_json import to_json
from .results import BenchmarkResults
from .tables import (
    MEAN_OVER_CLASSES,
    by_class,
    compared_by_class,
    compared_overall,
    overall,
    test_set_lines,
    transposed,
)

PAGE, JSON, SUPPLEMENT = "report.html", "report.json", "supplement.md"
AGGREGATES, COMPARISONS = "aggregates.csv", "comparisons.csv"


def write_benchmark_report(out: Path, results: BenchmarkResults) -> Path:
    """Write the page and its companions into ``out``, each file whole or not at all.

    Args:
        out: the benchmark's folder; made where it is missing.
        results: of an evaluation.

    Returns:
        The path of report.html.

    Raises:
        BenchmarkError: for results that do not fit together, or a folder that cannot be written.
    """
    lookup = Lookup(results)
    # All is made before anything is written: a fault leaves an older report as it was.
    content = to_json(results)
    texts = {
        AGGREGATES: aggregates_csv(results),
        COMPARISONS: comparisons_csv(results),
        SUPPLEMENT: to_markdown(results, lookup),
        PAGE: render(results, lookup, draw_pictures(results, lookup)),
    }
    try:
        write_json(out / JSON, content)
        for name, text in texts.items():
            write_text_atomically(out / name, text)
    except OSError as error:
        raise BenchmarkError(
            f"the report cannot be written to {out}: {error}; make room or name another folder, then run the "
            "evaluation again, which trains nothing anew"
        ) from error
    return out / PAGE


def render(results: BenchmarkResults, lookup: Lookup, pictures: Pictures) -> str:
    """The HTML page: everything inline, nothing fetched from elsewhere, no script."""
    heads = [MEAN_OVER_CLASSES, *lookup.classes]
    named = Classes.from_dataset_json(results.dataset_json)
    return (
        environment()
        .get_template("benchmark.html.j2")
        .render(
            results=results,
            pictures=pictures,
            cases=sum(len(names) for names in results.cases.values()),
            classes=lookup.classes,
            class_colours=colour_of(named),
            class_styles=style_of(named),
            styles=STYLES,
            overall=overall(lookup),
            by_class={metric: transposed(by_class(lookup, metric), heads) for metric in STYLES},
            compared={
                "overall": compared_overall(results),
                "classes": [
                    (style, pairs) for metric, style in STYLES.items() if (pairs := compared_by_class(results, metric))
                ],
            },
            compute_heads=HEADS,
            compute=compute_groups(results),
            all_hours=all_hours(results),
            test_set=test_set_lines(results, lookup.classes),
        )
    )
