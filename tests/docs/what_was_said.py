"""A plugin of pytest (``-p what_was_said``): what the package said while each test ran, as JSON in the file that
MASKSAM_TEST_SAID names: errors raised, output of commands, text that was captured, logs that were read.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

_said: dict[str, list[str]] = defaultdict(list)
_now = ""


def _keep(text: Any) -> None:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if isinstance(text, str) and text.strip() and text not in _said[_now]:
        _said[_now].append(text)


def _errors(kind: type[BaseException] = Exception) -> Iterator[type[BaseException]]:
    for cls in kind.__subclasses__():
        if cls.__module__.startswith("masksam_nnunet."):
            yield cls
        yield from _errors(cls)


def _listen_to(cls: Any) -> None:
    if "said" in cls.__dict__:
        return
    before = cls.__init__

    @wraps(before)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        if type(self) is cls:
            _keep(str(self))

    cls.__init__ = init
    cls.said = True


def _listening(function: Any, *parts: str) -> Any:
    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        for part in parts:
            _keep(getattr(result, part, None))
        return result

    return run


def pytest_configure() -> None:
    CliRunner.invoke = _listening(CliRunner.invoke, "stdout", "stderr")  # type: ignore[method-assign]
    subprocess.run = _listening(subprocess.run, "stdout", "stderr")
    read = Path.read_text

    def read_text(self: Path, *arguments: Any, **options: Any) -> str:
        text = read(self, *arguments, **options)
        if self.suffix in (".txt", ".log"):
            _keep(text)
        return text

    Path.read_text = read_text  # type: ignore[method-assign]
    pytest.CaptureFixture.readouterr = _listening(  # type: ignore[method-assign]
        pytest.CaptureFixture.readouterr, "out", "err"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    global _now
    _now = item.nodeid
    for cls in list(_errors()):
        _listen_to(cls)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for _, text in report.sections:
            _keep(text)


def pytest_sessionfinish() -> None:
    Path(os.environ["MASKSAM_TEST_SAID"]).write_text(json.dumps(_said, ensure_ascii=False, indent=1), encoding="utf-8")
