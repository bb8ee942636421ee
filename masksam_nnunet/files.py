"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

WRITTEN_SECONDS = 60.0
"""How long another process may take to write a JSON file."""
_Out = TypeVar("_Out")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` on success.

    A reader never sees half a file. After an error the temporary file is removed and ``path`` is as before.
    The parent folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, and put it in the place of ``folder`` on success.

    An earlier folder, or what a link leads to, is replaced. After an error it is as before, and nothing new is left.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    new_parent = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, earlier = (folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.{end}") for end in ("part", "earlier"))
    try:
        draft.mkdir()
        yield draft
        if folder.exists():
            os.rename(folder, earlier)
        os.rename(draft, folder)
    finally:
        if earlier.exists() and not folder.exists():
            os.rename(earlier, folder)
        for rest in (draft, earlier):
            shutil.rmtree(rest, ignore_errors=True)
        if new_parent and not folder.exists():
            with suppress(OSError):
                folder.parent.rmdir()


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text with :func:`atomic_write`."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON with :func:`atomic_write`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    write_text_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Errors are those of ``json`` and the file system."""
    return json.loads(path.read_text(encoding="utf-8"))


def once_written(read: Callable[[], _Out]) -> _Out:
    """What ``read`` returns; it is called again while the JSON file that it reads is half written by another process.

    nnU-Net writes JSON files in place, and folds may start at the same moment. Errors are those of ``read``.
    """
    end = time.monotonic() + WRITTEN_SECONDS
    while True:
        try:
            return read()
        except json.JSONDecodeError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
