"""The report: self-contained, escaped, strict JSON, and pictures of what the network returns."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up_benchmark import STATS, made_up_demo

from masksam_nnunet.benchmarks.demo_report import (
    MethodResult,
    Picture,
    Report,
    class_rows,
    number,
    overall_rows,
    render,
    to_json,
    write_report,
)
from masksam_nnunet.benchmarks.plots import draw_curves
from masksam_nnunet.files import write_json
from masksam_nnunet.inference.history import History
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.report.case_choice import choose_cases
from masksam_nnunet.inference.report.figures import CaseImages, InsideView, choose_slices, draw_case, draw_inside
from masksam_nnunet.inference.scoring import CaseScore, ClassScore, aggregate

NAMES = ("<b>liver & co</b>", "vessel")
CLASSES = Classes({NAMES[0]: (1,), NAMES[1]: (2,)}, has_regions=False, ignore_label=None)
PNG = b"\x89PNG\r\n\x1a\n made up"


def made_up_method(name: str, dice: float) -> MethodResult:
    first = ClassScore(dice, 4.0 - dice, dice / 2, 12.5, 11.0)
    nowhere = ClassScore(math.nan, math.nan, math.nan, 0.0, 0.0)
    cases = [CaseScore(case, dict(zip(NAMES, (first, nowhere), strict=True))) for case in ("case_a", "case_b")]
    return MethodResult(name, f"{name}Trainer", aggregate(cases, 1.0), STATS)


@pytest.fixture
def report() -> Report:
    methods = [made_up_method("nnU-Net", 0.8), made_up_method("MaskSAM", 0.75)]
    picture = Picture('A "picture" <i>', "of & for", PNG)
    return made_up_demo(
        methods,
        NAMES,
        picture,
        dataset="Dataset999_<script>alert(1)</script>",
        notes=["A note on <patients>."],
        inside_pictures=[picture],
        commands=['nnUNetv2_predict -i "$OUT/in" -o "$OUT/out"'],
    )


class Page(HTMLParser):
    """Collects tags, what they fetch, and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_cell = tag == "td"
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)


def test_page_is_self_contained(report: Report) -> None:
    html = render(report)
    page = Page(html)
    assert page.fetched and all(link.startswith("data:image/png;base64,") for link in page.fetched)
    assert base64.b64decode(page.fetched[0].split(",")[1]) == PNG
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)


def test_page_escapes_names_and_says_what_it_is(report: Report) -> None:
    html = render(report)
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "<b>liver" not in html and "&lt;b&gt;liver &amp; co&lt;/b&gt;" in html
    assert "&lt;patients&gt;" in html
    text = " ".join(html.split())
    for statement in ("It is not SAM", "no claim about converged results", "phantoms, computed by this package"):
        assert statement in text


def test_undefined_scores_are_dashes_and_the_best_is_bold(report: Report) -> None:
    html = render(report)
    page = Page(html)
    assert "–" in page.cells and not any("nan" in cell.lower() for cell in page.cells)
    assert '<td class="best">0.800</td><td>0.750</td>' in html
    assert "16\u2009500\u2009000" in html
    rows = dict(class_rows(report.methods, NAMES[0]))
    assert [cell.best for cell in rows["HD95 [mm]"]] == [True, False]  # 3.20 beats 3.25
    assert [cell.best for cell in rows["Volume in truth [ml]"]] == [False, False]
    assert [cell.text for cell in dict(overall_rows(report.methods))["Mean Dice"]] == ["–", "–"]
    assert not any(cell.best for cell in dict(class_rows([report.methods[0]], NAMES[0]))["Dice"])


def test_equal_numbers_are_not_best() -> None:
    alike = [made_up_method("a", 0.80001), made_up_method("b", 0.80002)]
    assert not any(cell.best for cell in dict(class_rows(alike, NAMES[0]))["Dice"])
    three = [*alike, made_up_method("c", 0.5)]
    assert [cell.best for cell in dict(class_rows(three, NAMES[0]))["Dice"]] == [True, True, False]


def test_number() -> None:
    assert number(3)(0.12345) == "0.123"
    assert number(0)(1234567) == "1\u2009234\u2009567"
    assert number(1)(math.nan) == "–"


def test_json_is_strict_and_complete(report: Report, tmp_path: Path) -> None:
    page = write_report(tmp_path, report)
    assert page == tmp_path / "report.html" and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    keys = {"dataset", "fold", "cases", "configuration", "batch_size", "minutes", "device", "versions", "scoring"}
    assert keys < content.keys()
    assert content == to_json(report)
    first, second = content["methods"]
    assert (first["name"], second["name"]) == ("nnU-Net", "MaskSAM")
    assert {
        *("name", "trainer", "mean_dice", "per_class", "train_seconds", "iterations"),
        *("peak_memory_mb", "parameters", "trainable_parameters"),
    } < first.keys()
    assert first["mean_dice"] is None
    assert first["per_class"][NAMES[0]]["dice"] == pytest.approx(0.8)
    assert first["per_class"][NAMES[0]]["hd95_cases"] == 2
    assert first["per_class"][NAMES[1]]["hd95_mm"] is None
    assert {"dice", "hd95_mm", "surface_dice"} < first["per_class"][NAMES[0]].keys()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", math.nan)
    assert not (tmp_path / "bad.json").exists()


def made_up_view() -> InsideView:
    """Two slices of 20 x 24: the first query found the first class, the second no object, the third background."""
    image = np.random.default_rng(0).normal(size=(2, 20, 24)).astype(np.float32)
    truth = np.zeros((2, 20, 24), dtype=np.int16)
    truth[0, 4:12, 8:16] = 1
    masks = np.zeros((2, 3, 20, 24), np.float32)
    masks[0, 0, 4:12, 8:16] = 1
    return InsideView(
        case="x",
        image=image,
        truth=truth,
        aspect=1.0,
        classes=np.array([[1, 0, 0]] * 2),
        confidence=np.full((2, 3), 0.9, np.float32),
        kept=np.array([[True, False, True]] * 2),
        boxes=np.tile(np.array([8, 4, 16, 12], np.float32), (2, 3, 1)),
        masks=masks,
    )


def made_up_case() -> CaseImages:
    truth = np.zeros((6, 40, 50), dtype=int)
    truth[1:5, 10:20, 10:25] = 1
    truth[2, 22:26, 12:18] = 2
    worse = np.roll(truth, 4, axis=2)
    worse[4] = 0
    image = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32) + truth
    return CaseImages(image, (3.0, 1.0, 1.0), truth, {"nnU-Net": truth, "MaskSAM": worse}, "MaskSAM")


def test_slices_show_the_structures_and_the_errors() -> None:
    images = made_up_case()
    assert choose_slices(images, CLASSES) == [(2, "most labelled voxels"), (4, "most errors of MaskSAM")]
    perfect = CaseImages(images.image, images.spacing, images.truth, {"MaskSAM": images.truth}, "MaskSAM")
    assert [index for index, _ in choose_slices(perfect, CLASSES)] == [2]


def test_pictures_are_drawn() -> None:
    history = History((10.0, 20.0), (1.0, 0.5), (0.9, math.nan), (0.2, 0.6))
    nothing = np.zeros((1, 8, 8), dtype=int)
    empty = CaseImages(nothing.astype(np.float32), (1.0, 1.0, 1.0), nothing, {"MaskSAM": nothing}, "MaskSAM")
    for png in (
        draw_curves({"nnU-Net": history, "MaskSAM": history}),
        draw_case(made_up_case(), CLASSES),
        draw_case(empty, CLASSES),
        draw_inside(made_up_view(), CLASSES),
    ):
        assert png.startswith(b"\x89PNG") and len(png) > 2000


def test_worst_median_and_best_case() -> None:
    ranking = {"a": 0.5, "b": 0.9, "c": math.nan, "d": 0.7}
    assert choose_cases(ranking) == {"a": "Worst case", "d": "Median case", "b": "Best case"}
    assert choose_cases({"a": 0.5, "b": 0.4}) == {"b": "Worst case", "a": "Best case"}
    assert choose_cases({"a": math.nan}) == {"a": "Only case"}
