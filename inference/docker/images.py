"""The platform's image files as the model's own reader takes them, and its label maps as the platform takes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from masksam_nnunet.errors import CaseError, DataError, in_short
from masksam_nnunet.files import write_json
from masksam_nnunet.plans.images import check_whole

from ..cases import Case
from .interface import OutputError, ending


def read_header(file: Path) -> sitk.ImageFileReader:
    """Read a file's geometry; raise CaseError if it cannot be read, or has neither two nor three dimensions."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(file, error) from error
    if reader.GetDimension() not in (2, 3):
        raise CaseError(f"{file} has {reader.GetDimension()} dimensions: give each channel or time its own file")
    return reader


def stage(files: Sequence[Path], folder: Path, file_ending: str, reader: Any) -> Case:
    """The files of all channels as they are, or as copies in ``folder`` where nnU-Net's ``reader`` lacks their format.

    Copies have the format ``file_ending`` of the model's dataset.

    Raises:
        CaseError: a file is damaged, or cannot be turned into the model's format.
    """
    staged = []
    for channel, file in enumerate(files):
        # Not .gz: compressing a volume takes longer than writing it.
        copy = folder / f"{channel}{file_ending.removesuffix('.gz')}"
        known = ending(file) in reader.supported_file_endings
        try:
            if not known:
                check_whole(file)
                image = sitk.ReadImage(str(file))
                sitk.WriteImage(image, str(copy), False)
                if isinstance(reader, Tiff3DIO):  # TIFF has no voxel sizes
                    write_json(copy.with_suffix(".json"), {"spacing": image.GetSpacing()[::-1]})
        except (DataError, RuntimeError, ValueError, OSError) as error:
            raise _unreadable(file, error) from error
        staged.append(file if known else copy)
    return Case("case", tuple(staged), numbered=False)


def write_label_map(predicted: Path, target: Path, header: sitk.ImageFileReader) -> dict[int, int]:
    """Write a label map as uint8, or uint16 for labels above 255, with the geometry in the image's ``header``.

    Return the number of voxels of each label.

    Raises:
        CaseError: the prediction is of another size than the image.
        OutputError: the disk is full or not writable.
    """
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted)))
    values, counts = np.unique(labels, return_counts=True)
    result = sitk.GetImageFromArray(labels.astype(np.uint8 if values.max() < 256 else np.uint16))
    if result.GetSize() != header.GetSize():
        raise CaseError(f"the prediction has {result.GetSize()} voxels, the image {header.GetSize()}: report this")
    for key in ("Spacing", "Origin", "Direction"):
        getattr(result, f"Set{key}")(getattr(header, f"Get{key}")())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(result, str(target), True)
        if not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(target))), labels):
            raise RuntimeError("the written file holds other labels")
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            target.unlink()
        raise OutputError(f"cannot write {target} ({in_short(error)}): make room there") from error
    return dict(zip(map(int, values), map(int, counts), strict=True))


def _unreadable(file: Path, error: Exception) -> CaseError:
    return CaseError(f"{file} is truncated, damaged or of another format ({in_short(error)}): copy it again")
