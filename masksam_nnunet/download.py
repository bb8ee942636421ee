"""Bring one large file into the cache: a broken connection costs only what was in flight, a wrong file stays out."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .errors import FetchError, unwritable

ATTEMPTS = 5
"""Attempts in a row that bring nothing new before giving up."""
CHUNK_BYTES = 1 << 16
"""Read size; at most this much of what has arrived is lost when a connection breaks."""
TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and between two arrivals of data."""
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class _BrokenOff(Exception):
    """This attempt failed, another one may succeed."""


_WORTH_ANOTHER = (
    _BrokenOff,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


def cache_dir() -> Path:
    """The folder of fetched files: $MASKSAM_CACHE, else $XDG_CACHE_HOME/masksam, else ~/.cache/masksam."""
    if folder := os.environ.get("MASKSAM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "masksam"


def fetch_verified(
    file_name: str,
    address: str,
    check: Callable[[Path, str], None],
    *,
    source: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Bring a published file into the cache, unless it is there and sound.

    The cached file appears only once it is complete and passes ``check``. A download that broke off is resumed from
    ``<file>.part``; what was fetched and does not pass is deleted. Concurrent calls wait for one another.

    Args:
        file_name: its name in the cache.
        address: http or https address; ending in "/", the folder that holds the file.
        check: raises FetchError unless the file at this path is the published one; the text says where it came from.
        source: a local file to copy instead of downloading.
        force: fetch from the beginning, whatever is in the cache.
        progress: show a progress bar on stderr.

    Returns:
        The cached file.

    Raises:
        FetchError: no connection, the file does not pass, or the cache cannot be written.
    """
    if address.endswith("/"):
        address += file_name
    target = cache_dir() / file_name
    part = target.with_name(f"{file_name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if source is not None:
                _copy(source, target, check)
                part.unlink(missing_ok=True)
            elif force or not _is_sound(target, check):
                if force:
                    part.unlink(missing_ok=True)
                download(address, part, progress=progress)
                _accept(part, target, check, address)
    except OSError as error:
        raise unwritable(error, target) from error
    return target


def download(url: str, part: Path, *, progress: bool = True) -> None:
    """Fetch ``url`` into ``part``, continuing after the bytes that ``part`` already holds.

    ``part`` is kept when the download fails or is interrupted, so that the next call resumes it. The caller checks
    what came: a length is compared here where the server states one, a hash is not.

    Args:
        url: http or https address of the file.
        part: file to fill, in a folder that exists. No other process may write it at the same time.
        progress: show a progress bar on stderr.

    Raises:
        FetchError: the server refuses, nothing new came in ``ATTEMPTS`` attempts, or the disk cannot be written.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress)
    furthest = _size(part)
    failures = 0
    with requests.Session() as session, bar:
        task = bar.add_task(part.name.removesuffix(".part"), total=None)
        while True:
            try:
                _attempt(session, url, part, bar, task)
                return
            except _WORTH_ANOTHER as error:
                reached = _size(part)
                # Beyond the furthest point, not merely some bytes: a server without ranges starts from 0 each time.
                failures = 0 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures >= ATTEMPTS or isinstance(error, requests.exceptions.SSLError):
                    raise FetchError(
                        f"cannot download {url}: {_reason(error)}; {reached} bytes are kept in {part}, the same "
                        "command resumes there; or name a mirror with --url, or a file that you have with --from"
                    ) from error
                pause = _pause_seconds(failures)
                bar.console.print(f"{_reason(error)}; trying again in {pause:g} s", markup=False, highlight=False)
                time.sleep(pause)
            except requests.RequestException as error:
                raise FetchError(f"cannot download {url}: {_reason(error)}; check the address (--url)") from error
            except OSError as error:
                raise unwritable(error, part) from error


def _attempt(session: requests.Session, url: str, part: Path, bar: Progress, task: TaskID) -> None:
    """One request, from the end of ``part`` to the end of the file."""
    held = _size(part)
    # Identity: a compressed answer has neither the file's length nor its offsets.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        status = response.status_code
        start, total = _content_range(response)
        if status == 416:
            if total == held:
                return  # all of it had come before
            part.unlink(missing_ok=True)
            raise _BrokenOff(f"the server's file is not the one begun ({held} bytes here), starting over")
        if status in _TRANSIENT:
            raise _BrokenOff(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            raise FetchError(
                f"cannot download {url}: the server answered {status} {response.reason}; name a mirror with --url, "
                "or a file that you have with --from"
            )
        if status == 206 and start != held:
            part.unlink(missing_ok=True)
            raise _BrokenOff(f"the server sent bytes from {start}, asked for {held}, starting over")
        offset = held if status == 206 else 0  # 200: the server ignores ranges and sends all of it
        length = response.headers.get("Content-Length", "")
        if total is None and length.isdigit():
            total = offset + int(length)
        bar.update(task, total=total, completed=offset)
        with part.open("ab" if offset else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.advance(task, len(chunk))
    if total is not None and _size(part) < total:
        raise _BrokenOff(f"the connection ended after {_size(part)} of {total} bytes")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of one cached file; the lock of a process that died is free."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is fetching {target.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_sound(target: Path, check: Callable[[Path, str], None]) -> bool:
    if not target.is_file():
        return False
    try:
        check(target, str(target))
    except FetchError:
        return False
    return True


def _copy(source: Path, target: Path, check: Callable[[Path, str], None]) -> None:
    """Copy a local file to its place in the cache, under another name until it is complete and verified."""
    if target.exists() and source.samefile(target):
        check(source, str(source))
        return
    candidate = target.with_name(f"{target.name}.copy")
    try:
        shutil.copyfile(source, candidate)
        _accept(candidate, target, check, str(source))
    finally:
        candidate.unlink(missing_ok=True)


def _accept(candidate: Path, target: Path, check: Callable[[Path, str], None], origin: str) -> None:
    """Move a complete file to its place in the cache, or delete it if it does not pass."""
    try:
        check(candidate, origin)
    except FetchError:
        candidate.unlink()
        raise
    os.replace(candidate, target)


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size named by ``Content-Range``, each None where it is not stated."""
    match = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    start, total = match.groups()
    return (int(start) if start else None), (int(total) if total != "*" else None)


def _pause_seconds(failures: int) -> float:
    return float(min(2**failures, 30))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
