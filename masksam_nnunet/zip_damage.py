"""Whether a checkpoint is a whole file: told without PyTorch, which takes seconds to import."""

from __future__ import annotations

import zipfile
from pathlib import Path


def damage(file: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint as a zip file, PyTorch's format; None if nothing.

    ``thorough``: its bytes are compared with their checksums, which PyTorch does not do.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip() if thorough else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return str(error) or repr(error)
    return None if bad is None else f"wrong checksum of {bad}"
