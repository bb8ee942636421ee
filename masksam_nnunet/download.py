"""Download one large file over HTTP so that a broken connection costs only what was in flight."""

from __future__ import annotations

import re
import time
from pathlib import Path

import requests
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

from masksam_nnunet.errors import WeightsError, unwritable

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


def download(url: str, part: Path, *, progress: bool = True) -> None:
    """Fetch ``url`` into ``part``, continuing after the bytes that ``part`` already holds.

    ``part`` is kept when the download fails or is interrupted, so that the next call resumes it. The caller checks
    what came: a length is compared here where the server states one, a hash is not.

    Args:
        url: http or https address of the file.
        part: file to fill, in a folder that exists. No other process may write it at the same time.
        progress: show a progress bar on stderr.

    Raises:
        WeightsError: the server refuses, nothing new came in ``ATTEMPTS`` attempts, or the disk cannot be written.
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
                    raise WeightsError(
                        f"cannot download {url}: {_reason(error)}; {reached} bytes are kept in {part}, the same "
                        "command resumes there; or name a mirror with --url, or a file that you have with --from"
                    ) from error
                pause = _pause_seconds(failures)
                bar.console.print(f"{_reason(error)}; trying again in {pause:g} s", markup=False, highlight=False)
                time.sleep(pause)
            except requests.RequestException as error:
                raise WeightsError(f"cannot download {url}: {_reason(error)}; check the address (--url)") from error
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
            raise WeightsError(
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
