"""Reads the command lines of README.md, CONTRIBUTING.md and docs/*.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page: str, folder: Path) -> list[list[str]]:
    """The commands in a page's ``sh`` blocks, split into words by bash; none of them runs.

    Args:
        page: its path from the root of the repository.
        folder: an empty folder for temporary files.
    """
    text = "\n".join(blocks(page, "sh"))
    # bash calls command_not_found_handle for every command that is not a builtin, since PATH is empty.
    # One write for each: commands in the background run at the same time.
    script = ["command_not_found_handle() { printf '%s\\0' \"$@\" $'\\n' >> recorded; }"]
    for name in {".", *re.findall(r"^[\w./]+/[\w.]+\.sh", text, re.MULTILINE)}:
        script.append(f'{name}() {{ command_not_found_handle {name} "$@"; }}')
    script += ["PATH=/nowhere", text]
    subprocess.run(["/bin/bash", "-c", "\n".join(script)], cwd=folder, check=True)
    lines = (folder / "recorded").read_text().split("\0\n\0")
    return [line.split("\0") for line in lines if line]
