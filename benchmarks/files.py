"""JSON files that the user may have removed or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.files import read_json


def read_or_refuse(file: Path, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        BenchmarkError: it is missing or not JSON; with the remedy.
    """
    try:
        return read_json(file)
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise BenchmarkError(f"{file} is not JSON ({error}); {remedy}") from error
