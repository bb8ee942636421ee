"""Write the challenge's archive: the same bytes for the same files, whole or not there, and read back."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np

from masksam_nnunet.errors import DataError, UsageError
from masksam_nnunet.files import atomic_write
from masksam_nnunet.plans.images import open_nifti

from .inspection import Inspection, SubmittedFile, label_values

_PRIVATE = ("descrip", "aux_file", "db_name", "intent_name")
_LEVEL = 6


def require_place(out: Path, predictions: Path, *, force: bool = False) -> None:
    """Raise UsageError for a place where no archive can be; before the predictions are checked, which may take long."""
    if out.suffix.lower() != ".zip" or out.is_dir():
        raise UsageError(f"--out {out}: name a file that ends in .zip")
    if out.exists() and not force:
        raise UsageError(f"--out {out}: the file exists; name another one, or give --force")
    if Path(os.path.abspath(out)).is_relative_to(os.path.abspath(predictions)):
        raise UsageError(f"--out {out}: lies in the folder of predictions; name another folder")


def package(inspection: Inspection, out: Path) -> None:
    """Write the archive of what was inspected and read it back; ``out`` is as before if anything fails.

    Raises:
        DataError: there are defects, a prediction has changed since, or what is read back differs.
        UsageError: ``out`` cannot be written.
    """
    if inspection.defects:
        raise DataError(refusal(inspection))
    try:
        with atomic_write(out) as draft:
            with zipfile.ZipFile(draft, "w") as archive:
                for file in sorted(inspection.files, key=lambda file: file.name):
                    entry = zipfile.ZipInfo(file.name)  # without a date: the same files give the same archive
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, _submitted(file))
            with zipfile.ZipFile(draft) as archive:
                damaged = archive.testzip()
            if damaged:
                raise DataError(f"{out}: {damaged} is damaged on the disk; nothing was kept, run again")
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"--out {out} cannot be written: {error}; nothing was kept") from error


def refusal(inspection: Inspection) -> str:
    """Every defect, one a line."""
    defects = "\n  ".join(inspection.defects)
    return f"{inspection.title}: nothing was written; defects: {len(inspection.defects)}\n  {defects}"


def _submitted(file: SubmittedFile) -> bytes:
    """The compressed NIfTI file that the challenge gets, decompressed once to see that it holds what it should.

    It has the header of the image, where there is one, for its grid; texts in the header, which may name people, are
    emptied.

    Raises:
        DataError: the prediction holds other values by now, or the file made differs from it.
    """
    source = open_nifti(file.prediction)
    stored = np.asanyarray(source.dataobj)
    if not np.issubdtype(stored.dtype, np.integer):
        stored = np.rint(stored).astype(np.int32)
    if label_values(stored) - file.values.keys():
        raise DataError(f"{file.prediction} has changed since it was checked; run again")
    table = np.zeros(max(file.values) + 1, file.dtype)
    table[list(file.values)] = list(file.values.values())
    voxels = table[stored]
    model = open_nifti(file.image) if file.image else source
    header = model.header.copy()
    header.set_data_dtype(np.dtype(file.dtype))
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    for name in set(_PRIVATE) & set(header.keys()):
        header[name] = b""
    header.extensions.clear()
    content = gzip.compress(type(model)(voxels, model.affine, header).to_bytes(), _LEVEL, mtime=0)
    made = type(model).from_bytes(gzip.decompress(content))
    stored = np.asanyarray(made.dataobj)
    if stored.dtype != voxels.dtype or not np.array_equal(stored, voxels) or not np.allclose(made.affine, model.affine):
        raise DataError(f"{file.name} as it would be submitted differs from {file.prediction}; nothing was kept")
    return content
