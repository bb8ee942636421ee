"""Portable models as zip files. What is unpacked is bounded, and nothing but a model's files comes out."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from masksam_nnunet.errors import PortableError

from .description import LARGEST_JSON, MOST_FOLDS, is_file_of_a_model

_CHUNK = 2**20
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError),
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same model gives the same archive


@dataclass(frozen=True)
class Limits:
    """What an archive may hold. Counted while it is unpacked: what its headers say is not trusted."""

    files: int = MOST_FOLDS + 4
    file_bytes: int = 2**35
    """Of one file: 32 GiB; a fold of ViT-H takes 2.8."""
    total_bytes: int = 2**37
    ratio: int = 200
    """Of a file to its part of the archive. Weights hardly shrink, JSON to a tenth; a bomb is a thousandfold."""


LIMITS = Limits()


def pack(folder: Path, file: Path) -> None:
    """Write all files of ``folder`` to a zip file; weights are noise, so they are not compressed."""
    with zipfile.ZipFile(file, "w") as archive:
        for source in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(source.name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED if source.suffix == ".json" else zipfile.ZIP_STORED
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            with source.open("rb") as stream, archive.open(info, "w", force_zip64=True) as member:
                shutil.copyfileobj(stream, member, _CHUNK)


def unpack(file: Path, folder: Path, limits: Limits = LIMITS) -> None:
    """Unpack a portable model into ``folder``, which must not be there, and on any error is not there afterwards.

    The archive holds the files of a model and no others, all at top level or all in one folder.

    Raises:
        PortableError: not a zip file, damaged, beyond the limits, or holding other names, folders, links, devices,
            one name twice, or something encrypted.
    """
    if os.path.lexists(folder):
        raise PortableError(f"{folder} is there already; name another folder to unpack into")
    whole = False
    try:
        folder.mkdir()
        with _opened(file) as archive:
            members = _members(archive, file, limits)
            left = limits.total_bytes
            for name, info in members.items():
                # A header can claim any size of a packed file, but not one beyond the archive's.
                packed = min(max(info.compress_size, 1), file.stat().st_size)
                most = min(left, limits.file_bytes, packed * limits.ratio)
                left -= _extract(archive, info, folder / name, most)
        whole = True
    except OSError as error:
        raise PortableError(f"cannot unpack {file} into {folder}: {error.strerror or error}; make room") from error
    finally:
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    if not file.is_file():
        raise PortableError(f"{file} is no file; name a portable model's folder, or its zip file")
    try:
        with _Bounded(file) as stream, zipfile.ZipFile(stream) as archive:
            yield archive
    # What zipfile and zlib raise for archives that are damaged, encrypted or of unknown methods.
    except PortableError:
        raise
    except _DAMAGED as error:
        raise PortableError(
            f"{file} cannot be unpacked ({error}); it is no zip file, or damaged: fetch it again"
        ) from error


class _Bounded(io.FileIO):
    """A file of which little is read at once: zipfile takes a whole list of contents at the length that it claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > 2 * _CHUNK:
            raise zipfile.BadZipFile("its list of contents is larger than any model's")
        return super().read(size)


def _where_to(archive: zipfile.ZipFile) -> str:
    """What to do with nnU-Net's own zip of a model."""
    if not any(name.endswith(".pth") for name in archive.namelist()):
        return ""
    return (
        ". It has checkpoints of nnU-Net's, which are pickles: if you trust where it comes from, install it with "
        "nnUNetv2_install_pretrained_model_from_zip"
    )


def _members(archive: zipfile.ZipFile, file: Path, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their names, once it is sure that there is nothing else."""
    result: dict[str, zipfile.ZipInfo] = {}
    prefixes = set()
    for info in archive.infolist():
        prefix, slash, name = info.filename.rpartition("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not name and slash and kind in (0, stat.S_IFDIR) and _is_plain(prefix) and not info.file_size:
            prefixes.add(prefix + "/")
            continue
        prefixes.add(prefix + slash)
        if info.orig_filename != info.filename or not is_file_of_a_model(name) or not (_is_plain(prefix) or not slash):
            raise PortableError(
                f"refused {file}: it holds {info.orig_filename!r:.100}, which is no file of a model{_where_to(archive)}"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise PortableError(f"refused {file}: {info.filename!r:.100} is encrypted, or not stored or deflated")
        if kind not in (0, stat.S_IFREG):
            raise PortableError(f"refused {file}: {info.filename!r:.100} is a link or a device, not a file")
        if name in result:
            raise PortableError(f"refused {file}: it holds {name!r:.100} twice")
        if len(result) == limits.files:
            raise PortableError(f"refused {file}: it holds more than {limits.files} files")
        result[name] = info
    if len(prefixes) > 1:
        raise PortableError(f"refused {file}: its files lie in several folders: {sorted(prefixes)!r:.100}")
    return result


def _is_plain(name: str) -> bool:
    """Whether this is the name of one folder; it is not used for anything."""
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0")


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, most: int) -> int:
    """Write a file; the number of its bytes."""
    if target.suffix == ".json":
        most = min(most, LARGEST_JSON)
    written = 0
    with archive.open(info) as source, _new(target) as stream:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > most:
                raise PortableError(
                    f"refused {archive.filename}: {info.filename!r:.100} has more than {most} bytes when unpacked, but "
                    "such a file of a model is not that large, or does not shrink that much"
                )
            stream.write(chunk)
    return written


def _new(file: Path) -> IO[bytes]:
    """Open a file that must not be there, whatever is in its place."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
