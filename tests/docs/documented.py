"""The commands of the pages: every line of every ```sh block of README.md and docs/*.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {path.name if path.parent == ROOT else f"docs/{path.name}": path for path in (
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))
)}  # fmt: skip

_BLOCK = re.compile(r"^(?P<mark><!-- run: (?P<tier>\w+) -->\n+)?```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
TIERS = ("quick", "long")

NOT_RUN = {
    r"pip install": "needs the network; tests/packaging installs the wheel",
    r"python3 -m venv|\. masksam-env": "the tests' own environment is used",
    r"make (demo|test|bench|test-long)": "builds an environment of its own; takes up to half an hour",
    r"(MEMORY=\S+ )?(TAG=\S+ )?inference/docker/container.sh": "needs Docker; other tests run its entry point",
    r"sbatch|squeue|scancel": "needs SLURM; the script that is submitted is run, see SCRIPTS",
    r"masksam benchmark .*--executor slurm": "needs SLURM; tests/slurm/run.sh",
    r"masksam benchmark .*--devices 0 1": "needs GPUs",
    r"masksam explain hippocampus_025": "needs the trainings of docs/results.md on the whole dataset",
    r".* -num_gpus 2": "needs two GPUs; tests/contract/test_distributed.py",
}
"""Lines that no tier runs, and why; they are read by their command's own parser all the same."""


@dataclass(frozen=True)
class Line:
    """One command line.

    Attributes:
        text: as it stands in the page, continued lines joined.
        number: of its first line in the page.
        tier: the test that runs it: quick (by default), long.
        not_run: why none does, else None.
    """

    text: str
    number: int
    tier: str
    not_run: str | None


def lines_of(page: Path) -> list[Line]:
    """The command lines of a page, in order.

    Raises:
        ValueError: a block has a mark that is no tier.
    """
    content = page.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(content):
        tier = block["tier"] or "long"
        if tier not in TIERS:
            raise ValueError(f"{page}: <!-- run: {tier} -->: there are {TIERS}")
        number = content.count("\n", 0, block.start("text")) + 1
        joined = block["text"].replace("\\\n", "\0")
        for text in joined.splitlines():
            if text.strip() and not text.lstrip().startswith("#"):
                command = text.replace("\0", " ").strip()
                reason = next((why for what, why in NOT_RUN.items() if re.match(what, command)), None)
                found.append(Line(command, number, tier, reason))
            number += 1 + text.count("\0")
    return found


def script(lines: list[Line]) -> str:
    """A bash script that runs the lines, saying which, to the first that fails."""
    parts = ["set -eo pipefail"]
    for line in lines:
        quoted = line.text.replace("'", "'\\''")
        parts += [f"printf '\\n[line {line.number}] %s\\n' '{quoted}'", line.text]
    return "\n".join(parts) + "\n"
