"""The report pages in headless Chromium: nothing overflows, every picture is shown, no error, no request."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from made_up_benchmark import made_up_results
from PIL import Image

from masksam_nnunet.benchmarks.report import write_report

pytestmark = pytest.mark.integration

_CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
if _CHROMIUM is None:
    pytest.skip("no Chromium on this machine: chromium, chromium-browser, google-chrome", allow_module_level=True)

SIXTEEN = [*(f"class {index} with a name as long as those of some challenges are" for index in range(1, 16)), "x" * 70]

_PROBE = """
<script>
window.__errors = [];
window.addEventListener("error", event => window.__errors.push(String(event.message || event.target.tagName)), true);
window.addEventListener("load", () => {
  const images = [...document.images];
  const seen = {
    width: document.documentElement.clientWidth,
    scroll: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
    height: document.documentElement.scrollHeight,
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).length,
    requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    outside: [...document.querySelectorAll("main *")]
      .filter(one => !one.closest(".scroll > *") && one.getBoundingClientRect().right > window.innerWidth + 1)
      .map(one => one.tagName + " " + one.textContent.slice(0, 60)),
    tables: document.querySelectorAll("table").length,
    cut: [...document.querySelectorAll("th, td")]
      .filter(one => one.offsetParent && one.getBoundingClientRect().right > window.innerWidth + 1)
      .map(one => one.textContent.slice(0, 60)),
    alarm: document.querySelector(".alarm")?.getBoundingClientRect().top ?? null,
    errors: window.__errors,
  };
  document.title = JSON.stringify(seen);
});
</script>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A demo's report, and one with six rows and sixteen classes, whose cases are drawn in white."""
    root, white = tmp_path_factory.mktemp("pages"), BytesIO()
    Image.new("RGB", (1500, 900), "white").save(white, "png")
    demo = made_up_results(root / "demo", ("anterior", "posterior"), row_count=2, folds=1, cases=4)
    demo = replace(demo, commands=("nnUNetv2_predict -i in -o " + "out" * 60,))
    large = made_up_results(root / "large", SIXTEEN, row_count=6, resamples=9, cases=2)
    with pytest.MonkeyPatch.context() as patch:
        written = {"demo": write_report(demo, root / "demo report")}
        patch.setattr("masksam_nnunet.benchmarks.pictures.draw_case", lambda *_: white.getvalue())
        yield written | {"large": write_report(large, root / "large report")}


def chromium(*arguments: str) -> str:
    """Its standard output."""
    assert _CHROMIUM is not None
    done = subprocess.run(
        [
            *(_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--virtual-time-budget=10000", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def measure(page: Path, width: int) -> dict[str, Any]:
    """What a script in a copy of the page sees once all is loaded."""
    copy = page.with_name(f"probed-{width}-{page.name}")
    text = page.read_text(encoding="utf-8")
    assert text.count("<head>") == 1
    copy.write_text(text.replace("<head>", "<head>" + _PROBE), encoding="utf-8")
    dumped = chromium(f"--window-size={width},1000", "--dump-dom", copy.as_uri())
    title = re.search(r"<title>(\{.*?\})</title>", dumped, re.DOTALL)
    assert title, dumped[:2000]
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    return seen


@pytest.mark.parametrize(("name", "pictures", "width"), [("demo", 8, 1600), ("large", 10, 800)])
def test_page_fits_its_window(pages: dict[str, Path], name: str, pictures: int, width: int) -> None:
    seen = measure(pages[name], width)
    assert seen["width"] == width
    assert seen["scroll"] <= width, seen["outside"][:5]
    assert seen["outside"] == []
    assert seen["images"] == pictures and seen["broken"] == 0
    assert seen["errors"] == [] and seen["requests"] == 0
    assert seen["height"] > 1500
    assert 0 <= seen["alarm"] < 300  # the first thing under the title


def test_printed_tables_are_not_cut_off(pages: dict[str, Path]) -> None:
    """On A4 with usual margins, about 718 pixels: the print rules as those of the screen."""
    text = pages["large"].read_text(encoding="utf-8")
    assert text.count("@media print") == 2
    page = pages["large"].with_name("printed.html")
    page.write_text(text.replace("@media print", "@media screen"), encoding="utf-8")
    seen = measure(page, 718)
    assert seen["scroll"] <= 718 and seen["tables"] > 10 and seen["cut"] == []
