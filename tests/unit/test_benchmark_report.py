"""The benchmark's report: complete, escaped, honest about what is undefined."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from made_up_benchmark import CASES, FOLDS, made_up_results
from markdown_it import MarkdownIt

from masksam_nnunet.benchmarks.case_values import case_differences, case_values
from masksam_nnunet.benchmarks.compute_table import HEADS, _short, all_hours, compute_groups
from masksam_nnunet.benchmarks.lookup import Lookup, focus
from masksam_nnunet.benchmarks.markdown import escape, to_markdown
from masksam_nnunet.benchmarks.metric_styles import STYLES
from masksam_nnunet.benchmarks.report import write_benchmark_report
from masksam_nnunet.benchmarks.report_json import to_json
from masksam_nnunet.benchmarks.results import BenchmarkResults, Comparison, Finding, Interval
from masksam_nnunet.benchmarks.tables import overall, p_value
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.report.figures import wrapped
from masksam_nnunet.inference.report.html import breakable, number, pieces

CLASSES = ("left | right", "<b>liver</b> $x$", "nowhere *")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResults:
    return made_up_results(tmp_path_factory.mktemp("benchmark"), CLASSES, absent=(CLASSES[2],))


@pytest.fixture(scope="module")
def out(results: BenchmarkResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_benchmark_report(folder, results) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags, what they fetch, and the texts of each table's rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self._in_cell = self._in_style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "data", "srcset", "action", "href")]
        self._in_style |= tag in ("style", "title")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("td", "th")
        self._in_style &= tag not in ("style", "title")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data
        if not self._in_style and data.strip():
            self.text.append(" ".join(data.split()))


def test_files_are_whole_and_json_is_strict(out: Path, results: BenchmarkResults) -> None:
    names = ["aggregates.csv", "comparisons.csv", "report.html", "report.json", "supplement.md"]
    assert sorted(path.name for path in out.iterdir()) == names

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert content == to_json(results)
    assert (content["schema"], content["schema_version"]) == ("masksam-benchmark", 1)
    undefined = next(a for a in content["aggregates"] if a["class_name"] == CLASSES[2] and a["metric"] == "hd95_mm")
    assert undefined["mean"] == {"estimate": None, "low": None, "high": None} and undefined["number"] == 0
    first = content["rows"][0]
    assert first["scores"]["cases"][0]["classes"][CLASSES[2]]["dice"] is None
    assert first["scores"]["cases"][3]["classes"][CLASSES[0]]["dice"] == pytest.approx(
        results.rows[0].scores.cases[3].classes[CLASSES[0]].dice
    )
    dice = first["histories"]["0"]["pseudo_dice"]
    assert dice[0] is None and dice[1:] == list(results.rows[0].histories[0].pseudo_dice[1:])
    assert content["truths"] == str(results.truths) and set(content["cases"]) == {str(fold) for fold in range(FOLDS)}


def test_severe_findings_open_the_page(html: str, results: BenchmarkResults) -> None:
    text = Page(html).text
    places = [next(i for i, line in enumerate(text) if finding.text in line) for finding in results.findings]
    severe, statement = places
    assert results.findings[0].severe and severe < 6 and severe < statement
    assert statement < next(i for i, line in enumerate(text) if "Surface Dice" in line)
    assert html.index("This is not a fair comparison") < html.index("<table")


def test_without_severe_findings_there_is_no_alarm(tmp_path: Path, results: BenchmarkResults) -> None:
    fair = replace(results, findings=(Finding(False, "All is alike."),))
    page = write_benchmark_report(tmp_path, fair).read_text(encoding="utf-8")
    assert "not a fair comparison" not in page and "All is alike." in page


def test_intervals_are_those_of_the_aggregates(html: str, out: Path, results: BenchmarkResults) -> None:
    rows = {row[0].removesuffix(" chosen by nnU-Net"): row[1:] for row in Page(html).tables[0]}
    lookup = Lookup(results)
    for row in results.rows:
        assert len(rows[row.name]) == 4
        for cell, (metric, style) in zip(rows[row.name], STYLES.items(), strict=True):
            found = lookup.aggregate(row.name, metric, None)
            digits = style.digits
            mean, low, high = (f"{v:.{digits}f}" for v in (found.mean.estimate, found.mean.low, found.mean.high))
            note = f"n = {found.number}" if found.number < CASES * FOLDS else ""
            assert cell == f"{mean}[{low}, {high}]{note}"
    frame = pd.read_csv(out / "aggregates.csv")
    assert len(frame) == len(results.aggregates) == len(results.rows) * 4 * (len(CLASSES) + 1)
    for line, one in zip(frame.itertuples(), results.aggregates, strict=True):
        expected = pytest.approx((one.mean.estimate, one.mean.low, one.mean.high, one.median), nan_ok=True)
        assert (line.mean, line.mean_low, line.mean_high, line.median) == expected
        assert (line.row, line.metric, line.cases) == (one.row, one.metric, one.number)
    compared = pd.read_csv(out / "comparisons.csv")
    assert list(compared["p_holm"]) == pytest.approx([c.p_holm for c in results.comparisons], nan_ok=True)
    assert list(compared["only_a"]) == [c.only_a for c in results.comparisons]


def test_best_is_bold_only_if_significant(results: BenchmarkResults) -> None:
    def bold(better: str | None, p: float) -> list[str]:
        rows = results.rows[:2]
        names = rows[0].name, rows[1].name
        changed = [
            replace(a, mean=Interval(0.9 if a.row == names[1] else 0.8, 0.7, 1.0))
            if a.metric == "dice" and a.class_name is None
            else a
            for a in results.aggregates
        ]
        one = Comparison("dice", None, *names, 5, Interval(-0.1, -0.2, -0.05), -0.1, p, p, -0.9, better)
        lookup = Lookup(replace(results, rows=rows, aggregates=tuple(changed), comparisons=(one,)))
        return [name for name, cells in overall(lookup)[0].rows if cells[0].best]

    second = results.rows[1].name
    assert bold(second, 0.001) == [second]
    assert bold(None, 0.2) == []
    assert bold(results.rows[0].name, 0.001) == []  # its mean is lower all the same


def test_undefined_is_a_dash(html: str, results: BenchmarkResults) -> None:
    tables = Page(html).tables
    assert not any("nan" in cell.lower().split() for table in tables for row in table for cell in row)
    hd95_by_class = tables[2]
    assert [row[1:] for row in hd95_by_class if row[0] == CLASSES[2]] == [["–n = 0"] * len(results.rows)]


def test_page_is_self_contained_and_escaped(html: str, results: BenchmarkResults) -> None:
    page = Page(html)
    assert page.fetched and all(re.match(r"data:image/png;base64,|#[\w-]+$", link) for link in page.fetched)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    worst = min(results.rows[1].scores.cases, key=lambda case: case.mean_dice)
    assert "<script>" in worst.case  # named so by the helper
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<b>liver" not in html and "&lt;b&gt;liver&lt;/b&gt;" in html
    for command in results.commands:
        assert command.replace('"', "&#34;") in html
    ids = set(re.findall(r'id="([\w-]+)"', html))
    assert {link[1:] for link in page.fetched if link.startswith("#")} <= ids


def test_all_sections_are_there(html: str, results: BenchmarkResults) -> None:
    heads = re.findall(r"<h2[^>]*>([^<]+)</h2>", html)
    assert heads == [
        "This is not a fair comparison",
        "Scores",
        "Scores by class",
        "Paired comparisons",
        "Plots",
        "Learning curves",
        "Worst, median and best case",
        "Compute used",
        "Test set",
        "What the scores mean",
        "Reproduce",
    ]
    # Boxes: 2; differences: 2; curves: 2; cases: 3.
    assert html.count("<img ") == 9
    assert "chosen by nnU-Net" in html and "scores.csv" in html
    for text in [*results.policies.values(), *results.versions, results.git_hash]:
        assert text in html.replace("&#39;", "'")


def test_a_picture_that_lacks_its_files_costs_no_report(tmp_path: Path, results: BenchmarkResults) -> None:
    page = write_benchmark_report(tmp_path, replace(results, images=tmp_path / "away"))
    html = page.read_text(encoding="utf-8")
    assert html.count("It could not be drawn") == 3 and "does not exist" in html


def table_rows(tokens: Iterable[object]) -> list[list[int]]:
    """Cells in each row of each table."""
    tables: list[list[int]] = []
    for token in tokens:
        kind = token.type  # type: ignore[attr-defined]
        if kind == "table_open":
            tables.append([])
        elif kind == "tr_open":
            tables[-1].append(0)
        elif kind in ("th_open", "td_open"):
            tables[-1][-1] += 1
    return tables


def test_markdown_has_the_right_cells(out: Path, results: BenchmarkResults) -> None:
    text = (out / "supplement.md").read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark").enable("table")
    tables = table_rows(markdown.parse(text))
    rows, classes, pairs = len(results.rows), len(CLASSES), 3
    expected = [[5] * (rows + 1)]
    expected += [[classes + 2] * (rows + 1)] * 4
    expected += [[12] * (pairs * 4 + 1)] + [[12] * (pairs * classes + 1)] * 4
    expected += [[6 + classes] * (len(results.test_set) + 1)]
    assert tables == expected
    # markdown-it fills up rows that are short and cuts those that are long, so count the bars too
    for line in text.splitlines():
        if line.startswith("|") and "left \\| right" in line and "mean over classes" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == classes + 3
    rendered = markdown.render(text)
    assert "<b>" not in rendered
    assert "left | right" in rendered and "&lt;b&gt;liver&lt;/b&gt; $x$" in rendered
    assert "–" in text and "nan" not in text.lower().split()
    lookup = Lookup(results)
    mean = lookup.aggregate(results.rows[0].name, "dice", CLASSES[0]).mean
    assert f"{mean.estimate:.3f} \\[{mean.low:.3f}, {mean.high:.3f}\\]" in text.replace("**", "")
    for metric in STYLES:
        assert text.count(f"[^{metric}]: ") == 1
    assert results.findings[0].text in rendered


def test_escape_leaves_no_markup() -> None:
    nasty = "a|b\n# c\\ *d* _e_ `f` [g](h) <i> $x$ ~~j~~ &amp;"
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(escape(nasty))
    assert html == "<p>a|b # c\\ *d* _e_ `f` [g](h) &lt;i&gt; $x$ ~~j~~ &amp;amp;</p>\n"


def test_compute_says_what_was_not_recorded(results: BenchmarkResults) -> None:
    groups = compute_groups(results)
    names = [row.name for row in results.rows]
    assert [group.title for group in groups] == [*names[:2], f"{names[2]} (its members together)"]
    assert not groups[2].lines and groups[2].total[1] == "9.00 (9/10)"
    first = groups[0]
    assert len(first.lines) == FOLDS and {len(line) for line in [*first.lines, first.total]} == {len(HEADS)}
    assert first.lines[0][1] == "1.00" and first.total[1] == "5.00"
    second = groups[1]  # its last fold tells nothing
    assert second.lines[-1][1] == second.lines[-1][2] == second.lines[-1][4] == second.lines[-1][6] == "not recorded"
    assert second.total[1] == "4.00 (4/5)"
    assert all_hours(results) == "9.00 (9/10)"


def test_differences_are_those_of_the_comparisons(results: BenchmarkResults) -> None:
    lookup = Lookup(results)
    a, b = results.rows[1], results.rows[0]
    for metric in STYLES:
        comparison = lookup.comparison(a.name, b.name, metric, None)
        differences = case_differences(a.scores, b.scores, metric)
        assert comparison is not None and comparison.a == a.name
        assert len(differences) == comparison.number
        assert sum(differences) / len(differences) == pytest.approx(comparison.difference.estimate)
        values = [v for v in case_values(a.scores, metric, None).values() if not math.isnan(v)]
        aggregate = lookup.aggregate(a.name, metric, None)
        assert len(values) == aggregate.number and sum(values) / len(values) == pytest.approx(aggregate.mean.estimate)


def test_focus_is_the_first_masksam(results: BenchmarkResults) -> None:
    assert focus(results) is results.rows[1]
    assert focus(replace(results, rows=results.rows[:1])) is results.rows[0]


def test_results_that_do_not_fit_together_are_refused(tmp_path: Path, results: BenchmarkResults) -> None:
    with pytest.raises(BenchmarkError, match="at least one row"):
        write_benchmark_report(tmp_path / "a", replace(results, rows=()))
    with pytest.raises(BenchmarkError, match="no aggregate of dice"):
        write_benchmark_report(tmp_path / "a", replace(results, aggregates=results.aggregates[1:]))
    with pytest.raises(BenchmarkError, match="have rows"):
        write_benchmark_report(tmp_path / "a", replace(results, rows=results.rows[:2]))
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="cannot be written to"):
        write_benchmark_report(tmp_path / "file", results)


def test_markdown_without_comparisons(results: BenchmarkResults) -> None:
    alone = replace(results, rows=results.rows[:1], comparisons=(), test_set=())
    text = to_markdown(alone, Lookup(alone))
    assert text.count("No rows were compared.") == 5 and "Test set" not in text


def test_numbers_for_people() -> None:
    assert [p_value(p) for p in (0.0123, 0.0004, 1.0, math.nan)] == ["0.012", "<0.001", "1.000", "–"]
    signed = number(3, signed=True)
    assert [signed(x) for x in (0.0123, -0.0123, -0.0001, math.nan)] == ["+0.012", "−0.012", "0.000", "–"]
    assert wrapped("MaskSAMTrainer_tiny_budget cost $5", 15) == "MaskSAMTrainer_\ntiny_budget\ncost \\$5"
    assert breakable("<b>_c") == "&lt;b&gt;_<wbr>c"
    assert pieces("nnUNetTrainer (nnUNetResEncUNetLPlans)", 24) == [
        "nnUNetTrainer ",
        "(nnUNet",
        "Res",
        "Enc",
        "UNet",
        "LPlans)",
    ]
    assert wrapped("a" * 50, 10, lines=2) == "a" * 10 + "\n" + "a" * 9 + "…"


def test_commits_are_shortened_where_lines_may_break() -> None:
    told = f"{'a' * 40}+changes then {'b' * 40}"
    assert _short(told) == "aaaaaaaa +changes then bbbbbbbb"
