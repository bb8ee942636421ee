"""The report pages in headless Chromium: nothing overflows, every picture is shown, no error, no request."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
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

CLASSES = [*(f"class {index} with a name as long as those of some challenges are" for index in range(1, 10)), "x" * 70]

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
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of six rows and many classes; cases and plots are white, since drawing them takes long."""
    root, white = tmp_path_factory.mktemp("page"), BytesIO()
    Image.new("RGB", (1500, 900), "white").save(white, "png")
    results = made_up_results(root, CLASSES, row_count=6, resamples=9, cases=2)
    results = replace(results, commands=("nnUNetv2_predict -i in -o " + "out" * 60,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("masksam_nnunet.benchmarks.pictures.draw_case", lambda *_: white.getvalue())
        patch.setattr("masksam_nnunet.benchmarks.plots.png", lambda _: white.getvalue())
        return write_report(results, root / "the report")


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


@pytest.mark.parametrize("width", [800, 1600])
def test_page_fits_its_window(page: Path, width: int) -> None:
    seen = measure(page, width)
    assert seen["width"] == width
    assert seen["scroll"] <= width, seen["outside"][:5]
    assert seen["outside"] == []
    assert seen["images"] >= 8 and seen["broken"] == 0
    assert seen["errors"] == [] and seen["requests"] == 0
    assert seen["height"] > 1500
    assert 0 <= seen["alarm"] < 300  # the first thing under the title


def test_printed_tables_are_not_cut_off(page: Path) -> None:
    """On A4 with usual margins, about 718 pixels: the print rules as those of the screen."""
    text = page.read_text(encoding="utf-8")
    assert text.count("@media print") == 2
    printed = page.with_name("printed.html")
    printed.write_text(text.replace("@media print", "@media screen"), encoding="utf-8")
    seen = measure(printed, 718)
    assert seen["scroll"] <= 718 and seen["tables"] > 10 and seen["cut"] == []
