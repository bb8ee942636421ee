"""Fetch one large file into the cache: a broken download is resumed, and a wrong file is not kept."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from .errors import MaskSAMError
from .files import atomic_write

ATTEMPTS = 5
"""Requests of one call before it gives up."""
CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = (10.0, 60.0)
"""Timeouts for the connection and between two reads."""


def cache_dir() -> Path:
    """The folder of fetched files: $MASKSAM_CACHE, else $XDG_CACHE_HOME/masksam, else ~/.cache/masksam."""
    if folder := os.environ.get("MASKSAM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "masksam"


def fetch_verified(
    file_name: str,
    address: str,
    check: Callable[[Path, str], None],
    kind: type[MaskSAMError],
    *,
    source: Path | None = None,
    force: bool = False,
) -> Path:
    """Bring a published file into the cache, unless it is there and passes ``check``.

    Concurrent calls wait for one another. A download that breaks off is kept in ``<file>.part`` and resumed by the next
    call; a file that does not pass is deleted.

    Args:
        file_name: its name in the cache.
        address: http or https address; ending in "/", the folder that holds the file.
        check: raises ``kind`` unless the file at this path is the published one; the text says where it came from.
        kind: the error to raise.
        source: a local file to copy instead of downloading.
        force: fetch from the beginning, whatever is in the cache.

    Returns:
        The cached file.

    Raises:
        kind: no connection, the file does not pass, or the cache cannot be written.
    """
    if source is not None and not (source.is_file() and os.access(source, os.R_OK)):
        raise kind(f"cannot read {source}: --from takes the file {file_name}")
    if address.endswith("/"):
        address += file_name
    target = cache_dir() / file_name
    part = target.with_name(f"{file_name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # released when its process dies
            if source is not None:
                with atomic_write(target) as draft:
                    shutil.copyfile(source, draft)
                    check(draft, str(source))
            elif force or not _passes(target, check):
                if force:
                    part.unlink(missing_ok=True)
                _download(address, part, kind)
                try:
                    check(part, address)
                except MaskSAMError:
                    part.unlink()
                    raise
                part.replace(target)
    except OSError as error:
        raise kind(
            f"cannot write {target}: {error.strerror or error}; free some space, or set MASKSAM_CACHE to a folder that "
            "can be written"
        ) from error
    return target


def _passes(target: Path, check: Callable[[Path, str], None]) -> bool:
    if not target.is_file():
        return False
    try:
        check(target, str(target))
    except MaskSAMError:
        return False
    return True


def _download(url: str, part: Path, kind: type[MaskSAMError]) -> None:
    """Fetch ``url`` into ``part``, continuing after the bytes that it already holds."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _attempt(url, part)
        except requests.RequestException as error:
            status = 500 if error.response is None else error.response.status_code
            refused = status < 500 and status not in (408, 425, 429)
            if refused or isinstance(error, ValueError) or attempt == ATTEMPTS:  # ValueError: no address
                raise kind(
                    f"cannot download {url}: {error}; the same command resumes it. Or name a mirror with --url, or a "
                    "file that you have with --from"
                ) from error
            print(f"{error}; trying again", file=sys.stderr)
            time.sleep(2**attempt)


def _attempt(url: str, part: Path) -> None:
    """One request, from the end of ``part`` to the end of the file."""
    held = part.stat().st_size if part.exists() else 0
    # Identity: a compressed answer has neither the file's length nor its offsets.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416:  # nothing comes after what is held
            return
        response.raise_for_status()
        start = held if response.status_code == 206 else 0  # else the server sends all of it
        length = response.headers.get("Content-Length", "")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with part.open("ab" if start else "wb") as file, Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(part.stem, total=start + int(length or 0) or None, completed=start)
            for chunk in response.iter_content(CHUNK_BYTES):
                bar.advance(task, file.write(chunk))
