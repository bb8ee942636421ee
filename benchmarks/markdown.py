"""Tables for a paper's supplement, in Markdown with pipe tables and footnotes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from masksam_nnunet.inference.report.html import UNDEFINED

from .lookup import Lookup
from .metric_styles import STYLES
from .results import BenchmarkResults
from .tables import (
    MEAN_OVER_CLASSES,
    Estimate,
    Group,
    Pairs,
    by_class,
    compared_by_class,
    compared_overall,
    overall,
    test_set_lines,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")


def escape(text: str) -> str:
    """``text`` on one line, with nothing in it that Markdown or HTML would take for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def to_markdown(results: BenchmarkResults, lookup: Lookup) -> str:
    """The supplement: scores, scores by class, comparisons, test set, and what all of it means."""
    cases = sum(len(names) for names in results.cases.values())
    parts = [
        f"# Benchmark on {escape(results.dataset)}",
        f"{escape(results.configuration)}, {len(results.folds)} folds, {cases} cases. Means over cases with bootstrap "
        "95 % confidence intervals in brackets, surface Dice at "
        f"{results.rows[0].scores.tolerance_mm:g} mm; n is given where a score is undefined in some cases. Bold: "
        "significantly better than the second best of its group; nothing bold: the data do not tell the two apart, or "
        "they were not compared.",
        *_findings(results),
        "## Means over classes",
        _overall(overall(lookup)),
    ]
    for metric, style in STYLES.items():
        parts += [f"## {escape(style.heading)} by class[^{metric}]", _by_class(by_class(lookup, metric), lookup)]
    parts += ["## Paired comparisons", *_comparisons(results)]
    if results.test_set:
        parts += ["## Test set", _test_set(results, lookup)]
    parts += _footnotes(results)
    return "\n\n".join(parts) + "\n"


def _findings(results: BenchmarkResults) -> list[str]:
    severe = [f"> **Not a fair comparison.** {escape(f.text)}" for f in results.findings if f.severe]
    others = [f"- {escape(f.text)}" for f in results.findings if not f.severe]
    return ["\n>\n".join(severe)] * bool(severe) + ["\n".join(others)] * bool(others)


def _overall(groups: Sequence[Group]) -> str:
    head = ["", *(f"{escape(style.heading)} {style.arrow}[^{metric}]" for metric, style in STYLES.items())]
    lines = [[escape(name), *map(_estimate, cells)] for group in groups for name, cells in group.rows]
    return _table(head, lines)


def _by_class(groups: Sequence[Group], lookup: Lookup) -> str:
    head = ["", MEAN_OVER_CLASSES, *map(escape, lookup.classes)]
    lines = [[escape(name), *map(_estimate, cells)] for group in groups for name, cells in group.rows]
    return _table(head, lines)


def _comparisons(results: BenchmarkResults) -> list[str]:
    about = (
        "Differences A − B over the n cases where both are defined: mean with its 95 % interval, and median; "
        "Wilcoxon's signed-rank test, two-sided, p corrected by Holm over classes; effect: matched-pairs rank-biserial "
        "correlation. Only A, only B: cases left out because the score is defined for one row only; in the mean over "
        "classes, cases of which a class is left out, though others may count. Better: at p (Holm) < 0.05."
    )
    parts = [about, "### Mean over classes", _pairs("Metric", compared_overall(results))]
    for metric, style in STYLES.items():
        parts += [f"### {escape(style.heading)} by class", _pairs("Class", compared_by_class(results, metric))]
    return parts


def _pairs(first: str, pairs: Pairs) -> str:
    head = ["A", "B", first, "A − B", "Median", "p", "p (Holm)", "Effect", "n", "Only A", "Only B", "Better"]
    lines = [
        [
            *map(escape, (a, b, name, line.difference, line.median, line.p, line.p_holm, line.effect)),
            *map(escape, (line.number, line.only_a, line.only_b, line.better or UNDEFINED)),
        ]
        for (a, b), found in pairs
        for name, line in found
    ]
    return _table(head, lines) if lines else "No rows were compared."


def _test_set(results: BenchmarkResults, lookup: Lookup) -> str:
    head = ["", "n", *(escape(style.heading) for style in STYLES.values())]
    head += [f"Dice, {escape(name)}" for name in lookup.classes]
    lines = [[escape(name), *map(escape, cells)] for name, cells in test_set_lines(results, lookup.classes)]
    return _table(head, lines)


def _footnotes(results: BenchmarkResults) -> list[str]:
    """The policies; those of no metric as plain notes, since nothing refers to them."""
    notes = [f"[^{metric}]: {escape(results.policies.get(metric, style.heading))}" for metric, style in STYLES.items()]
    others = [escape(text) for key, text in results.policies.items() if key not in STYLES]
    made_with = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    commit = f"; commit {results.git_hash}" if results.git_hash else ""
    return [*others, f"Made with {escape(made_with + commit)}.", *notes]


def _estimate(cell: Estimate) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return " ".join(part for part in (text, escape(cell.interval), f"({cell.note})" if cell.note else "") if part)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, [":--", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
