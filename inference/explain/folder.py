"""The output folder: whole or not at all, and never over somebody else's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masksam_nnunet.errors import ExplainError
from masksam_nnunet.files import read_json

RECORD = "explain.json"


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which takes its place in the end, and goes where something fails.

    An earlier output of ours, and nothing else, is replaced.

    Raises:
        ExplainError: ``out`` holds other files, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    _refuse_others(out)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield draft
        _replace(out, draft)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(draft)):
            raise
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(out: Path, draft: Path) -> None:
    if out.is_dir():
        _refuse_others(out)  # what has come there meanwhile
        earlier = draft.with_name(f"{draft.name}.earlier")
        os.replace(out, earlier)
        os.replace(draft, out)
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        os.replace(draft, out)


def _refuse_others(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ExplainError(f"--out {out}: is a file; name a folder")
    there = {path.name for path in out.iterdir()}
    others = sorted(there - _own(out / RECORD))
    if others:
        raise ExplainError(
            f"--out {out}: holds {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}, no output of masksam "
            "explain; name a new or an empty folder"
        )


def _own(record: Path) -> set[str]:
    try:
        content = read_json(record)
        return {RECORD, *map(str, content["files"])} if content["made_by"] == "masksam explain" else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _unwritable(out: Path, error: OSError) -> ExplainError:
    return ExplainError(
        f"--out {out}: cannot be written: {error.strerror or error}; make room, or name a folder that is yours"
    )
