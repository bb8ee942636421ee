"""Locks between processes of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from masksam_nnunet.errors import BenchmarkError

LOCK_FILE = "benchmark.lock"


@contextmanager
def locked(folder: Path, busy: str, wait: float, name: str = LOCK_FILE) -> Iterator[None]:
    """Keep other processes from doing the same in a folder, on any machine that shares it.

    The lock is released when this process ends, however it ends. It is ``flock``'s: network file systems have it from
    NFS 4 on, and Lustre if mounted with ``flock``; where it is not honoured, two runs must not be started at a time.

    Args:
        folder: is made if it is not there.
        busy: what is told if another process has the lock.
        wait: for it, in seconds.
        name: of the lock's file.

    Raises:
        BenchmarkError: if another process has it, or the folder cannot be written.
    """
    lock = FileLock(folder / name, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise BenchmarkError(f"{folder}: {busy}; wait until it has ended, then run again") from error
    except (OSError, NotImplementedError) as error:
        raise BenchmarkError(
            f"cannot lock {folder / name}: {error}; make room or make the folder writable, on a file system that "
            "has locks (flock)"
        ) from error
    try:
        yield
    finally:
        lock.release()
