"""A zip file that is the same for the same files, appears whole or not at all, and has been read back."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksam_nnunet.errors import SubmissionError

from .volumes import read_submitted

_DATE = (1980, 1, 1, 0, 0, 0)  # zip's first


class Member(NamedTuple):
    """A file of the archive. ``make`` returns it, its voxels and its affine matrix, when its turn comes."""

    name: str
    make: Callable[[], tuple[bytes, NDArray[np.generic], NDArray[np.float64]]]


def write_archive(out: Path, members: Iterable[Member]) -> None:
    """Write ``out`` under a hidden name beside it, read that back, and rename it.

    Args:
        out: the zip file; an earlier one is replaced.
        members: made and written one at a time, in the order of their names.

    Raises:
        SubmissionError: it cannot be written, or what was read back is not what was written; ``out`` is untouched.
    """
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        written: dict[str, str] = {}
        with zipfile.ZipFile(draft, "w") as archive:
            for name, make in sorted(members, key=lambda member: member.name):
                content, voxels, affine = make()
                archive.writestr(_entry(name), content)
                written[name] = _digest(voxels, affine)
        _verify(draft, written)
        os.replace(draft, out)
    except OSError as error:
        raise SubmissionError(
            f"cannot write {out}: {error.strerror or error}; nothing of it was kept. Make room, or name another file "
            "with --out"
        ) from error
    except ValueError as error:
        raise SubmissionError(f"cannot write {out}: {error}; nothing of it was kept. Run again") from error
    finally:
        draft.unlink(missing_ok=True)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = 0o644 << 16
    return entry


def _verify(file: Path, written: dict[str, str]) -> None:
    """Read everything back from the disk and compare it with what was meant."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.namelist() != list(written):
                raise ValueError(f"it holds {archive.namelist()[:5]}, not the files that were written")
            for name, digest in written.items():
                if _digest(*read_submitted(archive.read(name))) != digest:
                    raise ValueError(f"{name} in it has other voxels or another place")
    except OSError:
        raise
    except Exception as error:  # zipfile, gzip, zlib and nibabel each raise their own
        raise ValueError(f"read back, it is not what was written: {error}") from error


def _digest(voxels: NDArray[np.generic], affine: NDArray[np.float64]) -> str:
    """Of type, shape, values and place; the byte order in the file does not count."""
    digest = hashlib.sha256(f"{voxels.dtype.newbyteorder('=')} {voxels.shape}".encode())
    digest.update(voxels.astype(voxels.dtype.newbyteorder("="), copy=False).tobytes())
    digest.update(affine.astype(np.float64, copy=False).tobytes())
    return digest.hexdigest()
