"""The output folder, and the volumes and tables in it that 3D Slicer and ITK-SNAP open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.colors import to_rgb
from nibabel.orientations import aff2axcodes, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from masksam_nnunet.errors import UsageError
from masksam_nnunet.files import atomic_folder, read_json
from masksam_nnunet.plans.images import nibabel_affine

RECORD = "explain.json"
_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's world axes lead to left and posterior


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that becomes ``out`` on success; after an error ``out`` is as before.

    Raises:
        UsageError: ``out`` holds files that are no earlier output, or cannot be written.
    """
    _refuse_others(out)
    try:
        with atomic_folder(Path(os.path.abspath(out))) as draft:
            yield draft
            _refuse_others(out)  # what has come there meanwhile
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from error


def _refuse_others(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    try:
        record = read_json(out / RECORD)
        own = {RECORD, *map(str, record["files"])} if record["made_by"] == "masksam explain" else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    if others := sorted({path.name for path in out.iterdir()} - own):
        raise UsageError(f"--out {out} holds {others[0]}, no output of masksam explain; name another folder")


def affine_of(properties: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """The affine to RAS millimetres of an image as nnU-Net's reader read it; None if it has no 3D position."""
    if "nibabel_stuff" in properties:
        return nibabel_affine(properties)
    geometry = properties.get("sitk_stuff")
    if not geometry or len(geometry["spacing"]) < 3:
        return None
    total = len(geometry["spacing"])  # 4 for a file that holds all channels
    direction = np.reshape(geometry["direction"], (total, total))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = _RAS @ direction * np.asarray(geometry["spacing"][:3])
    affine[:3, 3] = _RAS @ np.asarray(geometry["origin"][:3])
    return affine


def write_volume(file: Path, array: NDArray[Any], properties: Mapping[str, Any]) -> None:
    """Write a (D, H, W) array of nnU-Net's reader as NIfTI on the voxels of the source file; its type is kept."""
    affine = affine_of(properties)
    if affine is None:  # a picture: millimetres of pixels where the file gives them
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        if "sitk_stuff" in properties:
            affine[:2, :2] *= properties["sitk_stuff"]["spacing"][:2]
        elif len(array) > 1:  # a TIFF volume
            affine[:3, :3] *= properties["spacing"][::-1]
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    stored = properties.get("sitk_stuff", {}).get("original_orientation")
    if "reoriented_affine" in properties.get("nibabel_stuff", {}):
        stored = "".join(aff2axcodes(properties["nibabel_stuff"]["original_affine"]))
    if stored:
        image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(stored)))
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    nibabel.save(image, file)


def write_tables(stem: Path, names: Mapping[int, str], colours: Mapping[int, str]) -> None:
    """Write names and colours of label values, ``stem``.label for ITK-SNAP and ``stem``.ctbl for 3D Slicer."""
    snap = [
        f"{'#' * 48}\n# ITK-SnAP Label Description File\n# File format:\n# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL"
    ]
    snap += ["#" * 48, '    0     0    0    0        0  0  0    "Clear Label"']
    slicer = [f"# Color table file {stem.name}.ctbl", f"# {len(names) + 1} values", "0 background 0 0 0 0"]
    for value, name in names.items():
        red, green, blue = (round(255 * part) for part in to_rgb(colours[value]))
        quoted, joined = name.replace('"', "'"), re.sub(r"\s+", "_", name.strip())
        snap.append(f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
        slicer.append(f"{value} {joined} {red} {green} {blue} 255")
    for ending, lines in (("label", snap), ("ctbl", slicer)):
        stem.with_name(f"{stem.name}.{ending}").write_text("\n".join(lines) + "\n", encoding="utf-8")
