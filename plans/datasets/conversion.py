"""What a converter knows about a download once it is checked, and how nnunetv2's converters are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Conversion:
    """A checked download.

    Attributes:
        name: of the dataset, after ``DatasetXXX_``.
        training: the cases that imagesTr and labelsTr must hold, as nnU-Net names them.
        test: the cases that imagesTs must hold.
        labelled_test: labelsTs must hold the test cases' labels.
        channels: files of each image.
        about: entries for dataset.json: reference, licence and the like.
        write: called with a folder and the dataset's number, writes ``DatasetXXX_Name`` there.
    """

    name: str
    training: tuple[str, ...]
    test: tuple[str, ...]
    about: dict[str, Any]
    write: Callable[[Path, int], None]
    labelled_test: bool = False
    channels: int = 1


@contextmanager
def nnunet_raw_at(module: ModuleType, folder: Path) -> Iterator[None]:
    """Let one of nnunetv2's converters write into ``folder``.

    The converters take the folder from a global of their module. It is not a string there but an object that reads
    the environment, which Dataset027_ACDC of nnunetv2 2.8.1 cannot handle.
    """
    before = module.nnUNet_raw
    module.nnUNet_raw = str(folder)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.nnUNet_raw = before  # type: ignore[attr-defined]
