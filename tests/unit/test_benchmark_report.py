"""The benchmark's report: complete, escaped, and clear about what is undefined."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from made_up_benchmark import CASES, FOLDS, WORST, made_up_results
from markdown_it import MarkdownIt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from masksam_nnunet.benchmarks import plots, tables
from masksam_nnunet.benchmarks import report as report_module
from masksam_nnunet.benchmarks.plots import choose_cases
from masksam_nnunet.benchmarks.report import render, to_json, to_markdown, write_report
from masksam_nnunet.benchmarks.results import MEAN, METRICS, BenchmarkResults, Finding
from masksam_nnunet.errors import UsageError
from masksam_nnunet.inference.report.html import Picture

CLASSES = ("left | right", "<b>liver</b> $x$", "nowhere *")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResults:
    return made_up_results(tmp_path_factory.mktemp("benchmark"), CLASSES, absent=(CLASSES[2],))


@pytest.fixture(scope="module")
def out(results: BenchmarkResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_report(results, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def table_texts(html: str) -> list[list[list[str]]]:
    """The text of each cell of each row of each table."""
    return [
        [
            [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr\b.*?</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>.*?</table>", html, re.DOTALL)
    ]


def test_files_are_whole_and_json_is_strict(out: Path, results: BenchmarkResults) -> None:
    names = ["aggregates.csv", "comparisons.csv", "report.html", "report.json", "scores.csv", "supplement.md"]
    assert sorted(path.name for path in out.iterdir()) == names

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert content == to_json(results)
    assert (content["schema"], content["schema_version"]) == ("masksam-benchmark", 2)
    undefined = next(a for a in content["means"] if a["class"] == CLASSES[2] and a["metric"] == "hd95_mm")
    assert undefined["mean"] is None and undefined["cases"] == 0
    scores = pd.DataFrame(**content["scores"])
    assert list(scores["value"]) == pytest.approx(list(results.scores["value"]), nan_ok=True)
    assert content["histories"]["nnUNetTrainer"]["0"]["pseudo_dice"][0] is None
    tables_of = {"scores": results.scores, "aggregates": results.means, "comparisons": results.comparisons}
    for name, table in tables_of.items():
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds."""
    for name in ("draw_boxes", "draw_differences", "draw_curves"):
        monkeypatch.setattr(report_module, name, lambda results: [])


@pytest.mark.usefixtures("undrawn")
def test_severe_findings_open_the_page(html: str, results: BenchmarkResults) -> None:
    severe, statement = results.findings
    assert html.index('class="alarm"') < html.index(severe.text) < html.index(statement.text) < html.index("<table")
    fair = replace(results, findings=(Finding(False, "All is alike."),), notes=("A note on <patients>.",))
    page = render(fair)
    assert 'class="alarm"' not in page and "All is alike." in page and "A note on &lt;patients&gt;." in page


def test_the_table_shows_means_and_intervals(html: str, results: BenchmarkResults) -> None:
    rows = {row[0].removesuffix(" chosen by nnU-Net"): row[1:] for row in table_texts(html)[0]}
    for line in results.means[results.means["class"] == MEAN].itertuples():
        digits = METRICS[line.metric].digits
        note = f"n = {line.cases}" if line.cases < CASES * FOLDS else ""
        expected = f"{line.mean:.{digits}f}[{line.low:.{digits}f}, {line.high:.{digits}f}]{note}"
        assert rows[line.method][list(METRICS).index(line.metric)] == expected
    assert html.count("chosen by nnU-Net</span>") == 1


def test_best_is_bold_only_if_significant() -> None:
    means = pd.DataFrame({"method": ["x", "y"], "metric": "dice", "class": MEAN, "mean": [0.8, 0.9]})
    for better, expected in (("y", "y"), (None, None), ("x", None)):  # the mean of x is lower all the same
        compared = pd.DataFrame([{"metric": "dice", "class": MEAN, "a": "x", "b": "y", "better": better}])
        assert tables.best_of(means, compared) == expected
        assert tables.best_of(means.assign(mean=[math.nan, 0.9]), compared) is None


def test_undefined_is_a_dash(html: str, results: BenchmarkResults) -> None:
    found = table_texts(html)
    assert not any("nan" in cell.lower().split() for table in found for row in table for cell in row)
    hd95_by_class = found[2]
    assert [row[1:] for row in hd95_by_class if row[0] == CLASSES[2]] == [["–n = 0"] * len(results.rows)]


def test_page_is_self_contained_and_escaped(html: str, results: BenchmarkResults) -> None:
    fetched = re.findall(r'<[^>]* (?:src|srcset|data|action|href)="([^"]*)"', html)
    assert fetched and all(re.match(r"data:image/png;base64,|#[\w-]+$", link) for link in fetched)
    assert not re.search("<(script|link|iframe|object)", html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert choose_cases(results)[WORST] == "Worst case" and "<script>" in WORST
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<b>liver" not in html and "&lt;b&gt;liver&lt;/b&gt;" in html
    for command in results.commands:
        assert command.replace('"', "&#34;") in html
    ids = set(re.findall(r'id="([\w-]+)"', html))
    assert {link[1:] for link in fetched if link.startswith("#")} <= ids


def test_all_sections_are_there(html: str, results: BenchmarkResults) -> None:
    ids = ["fairness", "scores", "classes", "comparisons", "plots", "curves", "cases", "compute", "test-set"]
    assert re.findall(r'id="([\w-]+)"', html) == [*ids, "policies", "reproduce"]
    assert html.count("<img ") == 2 + 2 + 2 + 3  # boxes, differences, curves, cases
    text = html.replace("&#39;", "'")
    assert all(policy in text for policy in results.policies.values())
    assert "2.8.0; 2.8.1" in html  # versions that differ between folds


def test_a_demo_of_one_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made_up_results(tmp_path / "one", ("a",), row_count=2, folds=1, cases=1)
    html = render(one)
    assert "[–]" in html and choose_cases(one) == {"case 000": "Only case"}
    assert 'id="inside"' not in html and 'id="test-set"' not in html
    assert not any("nan" in cell.lower().split() for table in table_texts(html) for row in table for cell in row)
    for name in ("draw_boxes", "draw_differences", "draw_curves", "draw_cases"):
        monkeypatch.setattr(report_module, name, lambda results: [])
    inside = Picture("case 001", "A caption.", b"\x89PNG made up")
    two = replace(made_up_results(tmp_path / "two", ("a", "b"), row_count=2, folds=1, cases=2), inside=(inside,))
    html = render(two)
    assert 'id="inside"' in html and inside.source in html
    assert choose_cases(two) == {"case 001": "Worst case", "case 000": "Best case"}


def test_a_case_is_better_with_a_larger_dice_and_with_a_smaller_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "tidy_png", lambda figure: drawn.append(figure) or b"")
    made = made_up_results(tmp_path, ("one",), row_count=2, folds=3, cases=11)
    (picture,) = plots.draw_differences(made)
    a, b = picture.title.split(" minus ")
    wins = []
    for ax, (name, sign) in zip(drawn[0].axes, {"dice": 1, "hd95_mm": -1, "surface_dice": 1}.items(), strict=False):
        values = made.scores[made.scores["metric"] == name].pivot(index="case", columns="method", values="value")
        gains = sign * (values[a] - values[b]).dropna()
        better, worse = (gains > 0).sum(), (gains < 0).sum()
        assert ax.get_xlabel() == f"better in {better}, worse in {worse}, of {len(gains)}"
        colours = [to_hex(colour) for colour in ax.collections[1].get_facecolors()]
        assert (colours.count(plots.BETTER), colours.count(plots.WORSE)) == (better, worse)
        wins.append(better - worse)
    assert all(wins), "no way to tell better from worse"


def test_three_methods_their_ensemble_and_post_processing(tmp_path: Path) -> None:
    six = made_up_results(tmp_path, ("a",), row_count=6, folds=1, cases=2)
    html = unescape(render(six)).replace("<wbr>", "")
    assert all(row.name in html for row in six.rows) and len({row.name for row in six.rows}) == 6


@pytest.mark.usefixtures("undrawn")
def test_a_missing_image_costs_no_report_and_a_folder_must_be_writable(
    tmp_path: Path, results: BenchmarkResults
) -> None:
    spoilt = replace(results, images=tmp_path / "away")
    html = render(spoilt)
    assert html.count("FileNotFoundError") == 3 and "<img " not in html
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"):
        write_report(spoilt, tmp_path / "file")


def test_markdown_has_the_right_cells(out: Path, results: BenchmarkResults) -> None:
    text = (out / "supplement.md").read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark").enable("table")
    shapes = [
        (len(part.splitlines()), part.splitlines()[1].count("|") - 1) for part in text.split("\n\n") if part[0] == "|"
    ]
    rows, classes, pairs = len(results.rows), len(CLASSES), 3
    expected = [(2 + 2 + rows, 5)] + [(2 + 1 + classes, 1 + rows)] * 4
    expected += [(2 + pairs * 5, 10)] + [(2 + pairs * (1 + classes), 10)] * 4 + [(2 + 1, 6 + classes)]
    assert shapes[:-1] == expected
    for line in text.splitlines():
        if line.startswith("| left \\| right"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (2 + rows, 11)
    rendered = markdown.render(text)
    assert "<b>" not in rendered
    assert "left | right" in rendered and "&lt;b&gt;liver&lt;/b&gt; $x$" in rendered
    assert "–" in text and "nan" not in text.lower().split()
    for metric in METRICS:
        assert text.count(f"[^{metric}]: ") == 1
    assert results.findings[0].text in rendered
    alone = replace(results, rows=results.rows[:1], comparisons=results.comparisons[:0], test_set=results.test_set[:0])
    assert to_markdown(alone).count("No rows were compared.") == 5


def test_compute_says_what_was_not_recorded(results: BenchmarkResults) -> None:
    table = tables.compute(results)
    (name, first), (other, second) = table.groups.items()
    assert [name, other] == [row.name for row in results.rows[:2]]
    assert {len(line) for line in [*first, *second]} == {len(table.heads)} and len(first) == FOLDS + 1
    assert first[0][1] == "1.00" and first[-1][1] == "5.00"
    assert second[-2][1] == second[-2][2] == second[-2][4] == second[-2][6] == "not recorded"
    assert second[-1][1] == "4.00 (4/5)" and tables.all_hours(results) == "9.00 (9/10)"
    commits = replace(results.compute[name][0], git_hash=f"{'a' * 40}+changes then {'b' * 40}")
    changed = tables.software(replace(results, compute={name: (commits,)}))
    assert ["commit", "aaaaaaaa+changes then bbbbbbbb", "01234567"] in changed.groups[""]
