"""Volumes and tables that 3D Slicer and ITK-SNAP open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import to_rgb
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's world axes lead to left and posterior


def write_volume(file: Path, array: NDArray[Any], properties: Mapping[str, Any]) -> None:
    """Write a source-grid array as NIfTI with the source's geometry; its number type is kept.

    Args:
        file: ending in .nii.gz.
        array: (D, H, W), the axes of nnU-Net's reader.
        properties: that reader's.
    """
    if "nibabel_stuff" in properties:
        _write_nibabel(file, array, properties["nibabel_stuff"])
        return
    geometry = properties.get("sitk_stuff")
    image = sitk.GetImageFromArray(array[0] if geometry and len(geometry["spacing"]) == 2 else array)
    if geometry:
        dimensions, total = image.GetDimension(), len(geometry["spacing"])
        image.SetSpacing(geometry["spacing"][:dimensions])
        image.SetOrigin(geometry["origin"][:dimensions])
        # Of a 4D file, which holds all channels, the part that is space.
        direction = np.reshape(geometry["direction"], (total, total))[:dimensions, :dimensions]
        image.SetDirection(direction.flatten().tolist())
        if "original_orientation" in geometry:
            image = sitk.DICOMOrient(image, geometry["original_orientation"])
    sitk.WriteImage(image, str(file), useCompression=True)


def affine_of(properties: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """From (i, j, k) of what the reader read to millimetres to the right, anterior and superior; None without any."""
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)
    geometry = properties.get("sitk_stuff")
    if not geometry or len(geometry["spacing"]) < 3:
        return None
    total = len(geometry["spacing"])
    direction = np.reshape(geometry["direction"], (total, total))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = _RAS @ direction * np.asarray(geometry["spacing"][:3])
    affine[:3, 3] = _RAS @ np.asarray(geometry["origin"][:3])
    return affine


def write_label_table(file: Path, names: Mapping[int, str], colours: Mapping[int, str]) -> None:
    """ITK-SNAP's label description: index, red green blue, opacity, visible in slices, as a mesh, name."""
    lines = [
        "################################################",
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        "################################################",
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for value, name in names.items():
        red, green, blue = _bytes(colours[value])
        quoted = name.replace('"', "'")
        lines.append(f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_colour_table(file: Path, names: Mapping[int, str], colours: Mapping[int, str]) -> None:
    """3D Slicer's colour table: index, name without spaces, red green blue opacity."""
    lines = [f"# Color table file {file.name}", f"# {len(names) + 1} values", "0 background 0 0 0 0"]
    for value, name in names.items():
        red, green, blue = _bytes(colours[value])
        joined = re.sub(r"\s+", "_", name.strip())
        lines.append(f"{value} {joined} {red} {green} {blue} 255")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bytes(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


def _write_nibabel(file: Path, array: NDArray[Any], stuff: Mapping[str, Any]) -> None:
    original = np.asarray(stuff["original_affine"])
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), stuff.get("reoriented_affine", original))
    if "reoriented_affine" in stuff:
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(original))
        image = image.as_reoriented(back)
    nibabel.save(image, file)
