"""Is a MetaImage file (.mha) whole? ITK fills damaged compressed data with zeros, and says nothing."""

from __future__ import annotations

import zlib
from pathlib import Path

from masksam_nnunet.errors import DataError

_LARGEST_HEADER = 1 << 16
_BLOCK = 1 << 22


def check_meta_image(file: Path) -> None:
    """Refuse a file without a header, or whose compressed data are cut off or damaged; they are read to their end.

    Data that are not compressed are left to ITK, which counts their bytes.

    Raises:
        DataError: what is wrong, in a few words.
        OSError: the file cannot be opened.
    """
    with file.open("rb") as stream:
        head = stream.read(_LARGEST_HEADER)
        end = head.find(b"\n", head.find(b"ElementDataFile"))
        if b"ElementDataFile" not in head or end < 0:
            raise DataError(f"it has no MetaImage header, but begins with {head[:20]!r}")
        lines = (line.split("=", 1) for line in head[:end].decode("latin-1").splitlines() if "=" in line)
        header = {key.strip(): value.strip() for key, value in lines}
        if header["ElementDataFile"] != "LOCAL":
            raise DataError(f"its voxels are in another file, {header['ElementDataFile']}: .mha holds both")
        if header.get("CompressedData", "").lower() != "true":
            return
        stream.seek(end + 1)
        unpack = zlib.decompressobj()
        try:
            while not unpack.eof and (block := stream.read(_BLOCK)):
                while block:
                    unpack.decompress(block, _BLOCK)
                    block = unpack.unconsumed_tail
        except zlib.error as error:
            raise DataError(f"its compressed voxels are damaged ({error})") from error
        if not unpack.eof:
            raise DataError("its compressed voxels are cut off")
