"""Every command of README.md and docs/*.md is read by its own parser, and run.

Lines in blocks marked ``<!-- run: quick -->`` are run by the default tests, all others by the long ones
(``make test-long``), page after page as a reader would, by the real commands in a folder of tiny data
(:mod:`documented_world`). ``small/sitecustomize.py`` says what is changed so that they fit a CPU and minutes. What no
test can run stands in :data:`documented.NOT_RUN` with its reason.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from documented import NOT_RUN, PAGES, ROOT, lines_of
from documented_parsers import Misread, read_command
from documented_world import World, new_world, recorded_commands

LINES = {name: lines_of(page) for name, page in PAGES.items()}
WITH_LINES = [name for name, lines in LINES.items() if lines]
RUN = {name: [line for line in lines if line.not_run is None] for name, lines in LINES.items()}
QUICK = {name: [line for line in lines if line.tier == "quick"] for name, lines in RUN.items()}

AFTER = {
    "docs/results.md": "docs/first_steps.md",
    "docs/submission.md": "docs/daily_use.md",
    "docs/planning.md": "docs/daily_use.md",
    "docs/own_dataset.md": "docs/daily_use.md",
    "docs/benchmark.md": "docs/daily_use.md",
    "docs/faq.md": "docs/daily_use.md",
    "docs/portable_models.md": "docs/daily_use.md",
    "docs/container.md": "docs/daily_use.md",
    "docs/explain.md": "docs/daily_use.md",
    "docs/paper.md": "docs/daily_use.md",
}
"""Pages that begin where another one ends, in its folder."""


@pytest.mark.parametrize("page", WITH_LINES)
def test_every_line_is_understood(page: str, tmp_path: Path) -> None:
    wrong = []
    commands = recorded_commands(LINES[page], tmp_path)
    assert commands
    for words in commands:
        try:
            read_command(words)
        except Misread as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "words",
    [
        ["masksam", "plan", "-d", "4", "--backbones", "vit_b"],
        ["masksam", "plan", "-d", "4", "--backbone", "vit_x"],
        ["masksam", "convert", "acdc", "X"],
        ["masksam", "predict", "-i", "X", "-o", "Y", "-d", "4", "-c", "2d", "--ensembles", "A", "B"],
        ["masksam", "train", "4", "2d", "0", "--npy"],
        ["nnUNetv2_train", "4", "2d"],
        ["nnUNetv2_trains", "4", "2d", "0"],
        ["masksam", "portray"],
        ["make", "tset"],
        ["unheard_of"],
    ],
)
def test_wrong_lines_are_noticed(words: list[str]) -> None:
    with pytest.raises(Misread):
        read_command(words)


def test_reasons_not_to_run_are_needed() -> None:
    texts = [line.text for lines in LINES.values() for line in lines if line.not_run]
    unused = [what for what in NOT_RUN if not any(re.match(what, text) for text in texts)]
    assert not unused


def test_blocks_of_commands_are_marked_as_such() -> None:
    """A ```bash or ```console block would escape these tests."""
    for page in PAGES.values():
        kinds = set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert kinds <= {"sh", "json", "python", "diff"}, page


def test_variables_exist() -> None:
    """Each variable of ours that a page names is one that the code reads, and the other way round."""
    sources = [p for folder in ("masksam_nnunet", "plans", "trainers", "inference") for p in (ROOT / folder).rglob("*")]
    code = "\n".join(p.read_text(encoding="utf-8") for p in sources if p.suffix in (".py", ".sh"))
    known = set(re.findall(r"\bMASKSAM_[A-Z0-9_]+", code))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    assert set(re.findall(r"\bMASKSAM_[A-Z0-9_]+", text)) == known


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and anchor not in _anchors(file):
                broken.append(f"{page.name}: {target}, which has no such heading")
    assert not broken


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def quick_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(tmp_path_factory.mktemp("quick")) as world:
        yield world


@pytest.mark.integration
@pytest.mark.parametrize("page", [name for name, lines in QUICK.items() if lines])
def test_quick_commands_run(page: str, quick_world: World) -> None:
    quick_world.run(QUICK[page], timeout=300)


class Reader:
    """Reads pages, each once, in worlds of their own or after another page."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self._folder = folder
        self._exits = exits
        self._worlds: dict[str, World] = {}
        self._failed: set[str] = set()

    def read(self, page: str) -> World:
        if page in self._failed:
            pytest.fail(f"{page} failed above")
        if page not in self._worlds:
            self._failed.add(page)
            earlier = AFTER.get(page)
            world = self.read(earlier) if earlier else self._new(page)
            world.run(RUN[page], timeout=3000)
            self._worlds[page] = world
            self._failed.remove(page)
        return self._worlds[page]

    def _new(self, page: str) -> World:
        root = self._folder / Path(page).stem
        root.mkdir()
        return self._exits.enter_context(new_world(root))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with ExitStack() as exits:
        yield Reader(tmp_path_factory.mktemp("pages"), exits)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", [name for name, lines in RUN.items() if lines])
def test_page_runs(page: str, reader: Reader) -> None:
    reader.read(page)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_array_script(status: int, requeued: bool, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands and the training."""
    for name, text in {
        "srun": 'exec "$@"',
        "scontrol": 'echo scontrol "$@" >> calls',
        "masksam": f'echo masksam "$@" >> calls; exit {status}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "docs" / "cluster" / "train_fold.sh"), "27", "3d_fullres", "-p", "MaskSAMPlans"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_JOB_ID": "9",
        },
    )
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["masksam train 27 3d_fullres 3 -p MaskSAMPlans --c", *(["scontrol requeue 9_3"] * requeued)]
