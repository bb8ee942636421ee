"""The platform's image files as the model's own reader takes them, and its label maps as the platform takes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from masksam_nnunet.errors import CaseError, DataError, in_short
from masksam_nnunet.plans.images import check_whole

from ..cases import Case
from .errors import OutputError
from .interface import ending
from .meta_images import check_meta_image


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file lie, in ITK's order: (x, y, z) or (x, y)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, file: Path) -> Geometry:
        """Read the header only.

        Raises:
            CaseError: it cannot be read, or is that of no picture or volume.
        """
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise _unreadable(file, error) from error
        if reader.GetDimension() not in (2, 3):
            raise CaseError(
                f"{file} has {reader.GetDimension()} dimensions: give each channel, or time, a file of its own"
            )
        return cls(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def stage(files: Sequence[Path], folder: Path, file_ending: str, reader: Any) -> Case:
    """Files named as nnU-Net names them, of formats that ``reader`` reads: links, or copies of another format.

    Args:
        files: one for each channel.
        folder: empty, writable.
        file_ending: of the model's dataset.
        reader: one of nnU-Net's.

    Raises:
        CaseError: a file is damaged, or cannot be turned into the model's format.
    """
    return Case(
        "case", tuple(_stage(file, folder / f"case_{c:04d}", file_ending, reader) for c, file in enumerate(files))
    )


def _stage(file: Path, target: Path, file_ending: str, reader: Any) -> Path:
    end = ending(file)
    try:
        if end.lower() == ".mha":
            check_meta_image(file)
        if end in reader.supported_file_endings:
            place = target.with_name(target.name + end)
            place.symlink_to(file.resolve())
            return place
        check_whole(file)
        image = sitk.ReadImage(str(file))
        # Compressing a volume takes longer than writing it.
        place = target.with_name(target.name + (".nii" if file_ending == ".nii.gz" else file_ending))
        sitk.WriteImage(image, str(place), False)
    except (DataError, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(file, error) from error
    return place


def in_terms_of(error: CaseError, case: Case, files: Sequence[Path]) -> str:
    """The message, with the names of the files that were given in place of the staged ones."""
    text = str(error)
    for staged, file in zip(case.files, files, strict=True):
        text = text.replace(str(staged), str(file)).replace(staged.name, str(file))
    return text


def write_label_map(predicted: Path, target: Path, geometry: Geometry) -> Mapping[int, int]:
    """Write a label map where the platform looks for it, whole or not at all; uint8, or uint16 for labels above 255.

    Args:
        predicted: nnU-Net's file.
        target: the file to write.
        geometry: of the image; the label map's own went through other formats.

    Returns:
        How many voxels each label has.

    Raises:
        CaseError: the prediction is of another size than the image.
        OutputError: the disk is full or not writable.
    """
    image = sitk.ReadImage(str(predicted))
    labels = sitk.GetArrayFromImage(image)
    values, counts = np.unique(labels, return_counts=True)
    result = sitk.GetImageFromArray(labels.astype(np.uint8 if values.max() < 256 else np.uint16))
    if result.GetSize() != geometry.size:
        raise CaseError(f"the prediction has {result.GetSize()} voxels, the image {geometry.size}: report this fault")
    result.SetSpacing(geometry.spacing)
    result.SetOrigin(geometry.origin)
    result.SetDirection(geometry.direction)
    draft = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(result, str(draft), True)
        if not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(draft))), labels):
            raise RuntimeError("what was written is not what is read back")
        os.replace(draft, target)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"cannot write {target} ({in_short(error)}): make room, and let the user write there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return dict(zip(map(int, values), map(int, counts), strict=True))


def _unreadable(file: Path, error: Exception) -> CaseError:
    return CaseError(
        f"{file} cannot be read as the model's images are; it is truncated, damaged or of another format: copy it anew "
        f"({in_short(error)})"
    )
