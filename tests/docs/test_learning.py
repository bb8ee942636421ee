"""The tables of docs/learning.md are those of the results that the repository holds."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from documented import ROOT


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "learning")
    return importlib.import_module("page")


def test_the_tables_are_written_from_the_results(page: Any) -> None:
    text = page.page_text()
    assert text == page.PAGE.read_text(encoding="utf-8")
    assert text.count("| `light` | the default |") >= 4
