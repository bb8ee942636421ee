"""One prediction: what is wrong with its file, and the file that the challenge gets."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import NDArray

from masksam_nnunet.plans.datasets.checks import open_nifti
from masksam_nnunet.plans.image_reading import Grid
from masksam_nnunet.plans.nifti_files import check_whole

_SHOWN = 5
_PRIVATE = ("descrip", "aux_file", "db_name", "intent_name")
_LEVEL = 6


def prediction_defects(path: Path, image: Path | None, allowed: Mapping[int, int]) -> tuple[list[str], bool]:
    """What is wrong with a prediction, and whether it holds background only.

    Args:
        path: a NIfTI file.
        image: the image that it must lie on, None if unknown.
        allowed: the values that it may hold, as keys.
    """
    try:
        check_whole(path)
        volume = open_nifti(path)
        stored = np.asanyarray(volume.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        return [f"cannot be read, it is truncated or damaged: {_in_short(error)}; predict this case again"], False
    if stored.ndim != 3:
        return [f"has the shape {stored.shape}, a label map has 3 dimensions"], False
    defects = grid_defects(path, image) if image else []
    odd, first = _odd_voxels(volume, stored)
    if odd:
        return [
            *defects,
            f"is no label map: {odd} voxels are NaN, infinite or no whole numbers, such as {first:g} ({stored.dtype}); "
            "give label maps, not probabilities",
        ], False
    values = _values(stored)
    foreign = sorted(values - allowed.keys())
    if foreign:
        shown = ", ".join(map(str, foreign[:_SHOWN])) + (", ..." if len(foreign) > _SHOWN else "")
        defects.append(f"holds the labels {shown}, dataset.json has only {', '.join(map(str, sorted(allowed)))}")
    return defects, values <= {0}


def grid_defects(path: Path, image: Path) -> list[str]:
    """Where a prediction lies on another grid than its image; one reader that puts them on the same is enough.

    A header holds its placement twice, and readers choose: nnU-Net's predictions repeat what its own reader chose.
    """
    try:
        check_whole(image)
        difference = _nibabel_grid(open_nifti(image)).difference(_nibabel_grid(open_nifti(path)))
    except Exception as error:
        return [f"cannot be compared with its image {image}: {_in_short(error)}; unpack the images again"]
    if difference is None:
        return []
    try:
        if _itk_grid(image).difference(_itk_grid(path)) is None:
            return []
    except RuntimeError:  # ITK refuses axes that are not at right angles
        pass
    what, wanted, found = difference
    return [f"{what} {_numbers(found)} is not its image's {_numbers(wanted)}; predict from the challenge's own images"]


def submitted_file(
    path: Path, image: Path | None, values: Mapping[int, int], dtype: str
) -> tuple[bytes, NDArray[np.generic], NDArray[np.float64]]:
    """The compressed NIfTI file that the challenge gets; the same input makes the same bytes.

    It has the header of the image, where there is one, for its grid; texts in it, which may name people, are emptied.

    Args:
        path: a prediction without defects.
        image: the image that it lies on.
        values: the challenge's value for each value of the prediction.
        dtype: of the voxels.

    Returns:
        The file, its voxels (X, Y, Z) and its affine matrix (4, 4).

    Raises:
        ValueError: the prediction holds other values by now.
        OSError: it cannot be read any more.
    """
    source = open_nifti(path)
    stored = np.asanyarray(source.dataobj)
    if not np.issubdtype(stored.dtype, np.integer):
        stored = np.rint(stored).astype(np.int32)
    if _values(stored) - values.keys():
        raise ValueError(f"{path} has changed since it was checked")
    table = np.zeros(max(values) + 1, dtype)
    table[list(values)] = list(values.values())
    voxels: NDArray[np.generic] = table[stored]
    model = open_nifti(image) if image else source
    header = model.header.copy()
    header.set_data_dtype(np.dtype(dtype))
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    for name in set(_PRIVATE) & set(header.keys()):
        header[name] = b""
    header.extensions.clear()
    made = type(model)(voxels, model.affine, header)
    return gzip.compress(made.to_bytes(), _LEVEL, mtime=0), voxels, np.asarray(made.affine)


def read_submitted(content: bytes) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Voxels, of the stored type, and affine matrix of what :func:`submitted_file` made; errors are libraries' own."""
    data = gzip.decompress(content)
    form = nibabel.Nifti2Image if int.from_bytes(data[:4], "little") == 540 else nibabel.Nifti1Image
    image = form.from_bytes(data)
    return np.asanyarray(image.dataobj), np.asarray(image.affine)


def _odd_voxels(volume: nibabel.Nifti1Image, stored: NDArray[Any]) -> tuple[int, float]:
    """How many voxels are no whole number, and the first of them."""
    if not np.issubdtype(stored.dtype, np.floating):
        return 0, 0.0
    scaling = cast(ArrayProxy, volume.dataobj)
    rounding = 0.0 if (scaling.slope, scaling.inter) == (1, 0) else 2e-4  # scaling in a header leaves 0.9999
    with np.errstate(invalid="ignore"):  # inf - inf
        odd = stored[~(np.abs(stored - np.rint(stored)) <= rounding)]
    return odd.size, float(odd[0]) if odd.size else 0.0


def _values(stored: NDArray[Any]) -> set[int]:
    """The values that occur; slice by slice, which sorts little at once."""
    found: set[int] = set()
    for index in range(stored.shape[2]):
        found.update(int(value) for value in np.unique(np.rint(stored[..., index])))
    return found


def _nibabel_grid(image: nibabel.Nifti1Image) -> Grid:
    """The grid (X, Y, Z) after nibabel, of the first three dimensions."""
    affine = np.asarray(image.affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = affine[:3, :3] / np.where(spacing == 0, 1, spacing)
    return Grid(
        tuple(image.shape[:3]), tuple(map(float, spacing)), {"origin": affine[:3, 3], "direction": direction.ravel()}
    )


def _itk_grid(path: Path) -> Grid:
    """The grid (X, Y, Z) after ITK, of the first three dimensions."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    axes = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
    return Grid(
        tuple(reader.GetSize()[:3]),
        tuple(reader.GetSpacing()[:3]),
        {"origin": np.array(reader.GetOrigin()[:3]), "direction": direction.ravel()},
    )


def _numbers(value: object) -> str:
    parts = np.ravel(np.asarray(value, dtype=float)).round(6)  # no -0
    return "(" + ", ".join(f"{part + 0.0:.4g}" for part in parts) + ")"


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
