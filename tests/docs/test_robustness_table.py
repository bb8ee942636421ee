"""docs/robustness.md: each case has its test, and each message is the code's own.

In a message "…" stands for what a run puts there. What stands between must be found, letter by letter, in one text of
the package's source; the long test runs all tests that the page names and looks for the messages in what was said.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from documented import ROOT

PAGE = ROOT / "docs" / "robustness.md"
PACKAGE = ("masksam_nnunet", "plans", "trainers", "inference")
LEAST = 30
"""Cases that the page must have."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what is said, as on the page, exit code, and its test below tests/."""

    wrong: str
    command: str
    said: tuple[str, ...]
    exit_code: str
    test: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[-1].startswith("`") and "::" in cells[-1]:
            wrong, command, said, exit_code, test = cells
            found.append(Row(wrong, command, tuple(re.findall(r"`([^`]+)`", said)), exit_code, test.strip("`")))
    return found


ROWS = rows()
IDS = [row.wrong[:60] for row in ROWS]


def pieces(message: str) -> list[str]:
    """What stands between the values of a run."""
    return [piece.strip() for piece in message.split("…") if piece.strip()]


@cache
def texts() -> str:
    """Every text in the package's source, cut where a value is put in; docstrings and comments are none."""
    found = set()
    for file in (file for folder in PACKAGE for file in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loose:
                found.add(node.value)
    return "\0".join(found)


def is_ours(piece: str) -> bool:
    """Whether a text of the package holds it; sentences are put together of clauses."""
    if piece.strip(":;,.() ") in texts():
        return True
    clauses = re.split(r"(?<=[:;.]) |(?<=[^ ]) (?=\()", piece)
    return len(clauses) > 1 and all(map(is_ours, clauses))


def test_there_are_cases_enough() -> None:
    assert len(ROWS) >= LEAST
    assert len({(row.wrong, row.command) for row in ROWS}) == len(ROWS)
    said = re.search(r"(\d+) cases", PAGE.read_text(encoding="utf-8"))
    assert said is not None and int(said[1]) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_messages_are_those_of_the_code(row: Row) -> None:
    assert re.fullmatch(r"0|1|2|3|75", row.exit_code)
    assert "`" in row.command or row.command == "any"
    if not row.said:
        assert row.exit_code == "0"
    for message in row.said:
        assert max(map(len, pieces(message))) >= 10, f"{message}: too little of it is fixed"
        for piece in pieces(message):
            assert is_ours(piece), f"no text of the package holds {piece!r}"


@cache
def names_in(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The tests of a file, and all its texts: the names of parameters are among them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(tests), frozenset(value for value in constants if isinstance(value, str))


@pytest.mark.parametrize("test", sorted({row.test for row in ROWS}))
def test_every_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    function, _, parameters = name.rstrip("]").partition("[")
    tests, names = names_in(ROOT / "tests" / file)
    assert function in tests
    either = [parameters, *parameters.rsplit("-", 1)]
    assert not parameters or parameters in names or set(either[1:]) <= names


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_tests_get_these_messages(tmp_path: Path) -> None:
    kept = tmp_path / "said.json"
    named = sorted({row.test for row in ROWS})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "what_was_said", "-p", "no:cacheprovider", *named],
        cwd=ROOT / "tests",
        env=os.environ | {"MASKSAM_TEST_SAID": str(kept), "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    said = {test.removeprefix("tests/"): texts for test, texts in json.loads(kept.read_text(encoding="utf-8")).items()}
    missing = []
    for row in ROWS:
        heard = [text for test in said if test == row.test or test.startswith(f"{row.test}[") for text in said[test]]
        missing += [
            f"{row.test}: {message}" for message in row.said if not any(heard_in(message, text) for text in heard)
        ]
    assert not missing, "\n".join(missing)


def heard_in(message: str, text: str) -> bool:
    """Wherever a console has broken the line."""
    wanted = ".*?".join(re.escape(" ".join(piece.split())) for piece in pieces(message))
    return re.search(wanted, " ".join(text.split()), re.DOTALL) is not None


NUMBERS = re.compile(r"^\w+, LONG = ([\d_]+), ([\d_]+)$", re.MULTILINE)


def test_the_numbers_of_fuzzing_are_those_of_the_tests() -> None:
    rows = re.findall(r"^\| .* \| `(\w+/test_\w+\.py)` \| ([\d ]+) \| ([\d ]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= 5
    for file, *numbers in rows:
        found = NUMBERS.search((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert found is not None
        assert [int(number.replace(" ", "")) for number in numbers] == [int(number) for number in found.groups()], file
