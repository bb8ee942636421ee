"""The files of predicted cases, which are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from masksam_nnunet.errors import UsageError
from masksam_nnunet.plans.images import check_whole

from .postprocessing import Postprocessing


@dataclass(frozen=True)
class Predictions:
    """A folder of predictions, as processes pass it to each other.

    Attributes:
        folder: made when a case is written.
        ending: of label maps.
        reader: nnU-Net's, for the model's images and label maps.
        probabilities: whether a case also has nnU-Net's ``CASE.npz`` and ``CASE.pkl``.
        postprocessing: applied to the label maps, not to the probabilities, as in nnU-Net.
    """

    folder: Path
    ending: str
    reader: Any
    probabilities: bool = False
    postprocessing: Postprocessing | None = None

    def files(self, case: str) -> list[Path]:
        """All files that a case can have, the label map last; beside a TIFF stands a .json with its spacing."""
        beside = (".json",) if self.ending.lower() in Tiff3DIO.supported_file_endings else ()
        return [self.folder / f"{case}{end}" for end in (".npz", ".pkl", *beside, self.ending)]

    def is_whole(self, case: str) -> bool:
        """Whether a case's label map, and its probabilities if wanted, exist and can be read to their end."""
        archive, properties, *_, label_map = self.files(case)
        try:
            check_whole(label_map)
            self.reader.read_seg(str(label_map))
            if not self.probabilities:
                return True
            with zipfile.ZipFile(archive) as opened:
                whole = opened.testzip() is None and "probabilities.npy" in opened.namelist()
            return whole and properties.read_bytes()[-1:] == b"."  # how every pickle ends
        except Exception:  # each reader has errors of its own
            return False

    def remove(self, case: str) -> None:
        """Remove all files of a case."""
        for file in self.files(case):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def draft(self, case: str) -> Iterator[Path]:
        """Yield a file name without ending, as nnU-Net's functions take it, to write a case to.

        The files lie in a hidden folder, which the next attempt on this case clears, and move to their places once all
        are post-processed and can be read back.

        Raises:
            UsageError: the disk is full or not writable.
        """
        hidden = replace(self, folder=self.folder / f".{case}.draft")
        try:
            shutil.rmtree(hidden.folder, ignore_errors=True)
            hidden.folder.mkdir(parents=True)
            yield hidden.folder / case
            if self.postprocessing is not None:
                self.postprocessing.apply(hidden.files(case)[-1], self.reader)
            if not hidden.is_whole(case):
                raise OSError(errno.ENOSPC, "it cannot be read back, the disk may be full")
            for file, place in zip(hidden.files(case), self.files(case), strict=True):
                if file.is_file():
                    os.replace(file, place)
        except OSError as error:
            raise UsageError(
                f"-o: cannot write the prediction of {case} to {self.folder}: {error.strerror or error}; make room or "
                "make the folder writable, and add --continue_prediction"
            ) from error
        finally:
            shutil.rmtree(hidden.folder, ignore_errors=True)
