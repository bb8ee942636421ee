"""A challenge's archive of a folder of predictions."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from masksam_nnunet.errors import SubmissionError

from .archive import Member, write_archive
from .inspection import Inspection, Request
from .volumes import submitted_file


def require_place(out: Path, request: Request, *, force: bool = False) -> None:
    """Refuse a place where no archive can be put, before hours of checking.

    Raises:
        SubmissionError: naming --out, what is there, and the remedy.
    """
    if out.suffix.lower() != ".zip":
        raise SubmissionError(f"--out {out}: the archive is a zip file; give a name that ends in .zip")
    if out.is_dir():
        raise SubmissionError(f"--out {out} is a folder; give the name of a file in it")
    if out.exists() and not force:
        raise SubmissionError(f"--out {out} is there already, nothing was changed; give another name, or --force")
    inside = Path(os.path.abspath(out)).is_relative_to(os.path.abspath(request.predictions))
    if inside:
        raise SubmissionError(f"--out {out} lies in PREDICTIONS, where it does not belong; give another folder")


def package(inspection: Inspection, out: Path) -> None:
    """Write the archive of what was inspected, verified, or nothing.

    Raises:
        SubmissionError: there are defects, all of which it lists, or ``out`` cannot be written.
    """
    if inspection.defects:
        raise SubmissionError(refusal(inspection))
    members = [
        Member(entry.name, partial(submitted_file, entry.prediction, entry.image, entry.values, entry.dtype))
        for entry in inspection.entries
    ]
    write_archive(out, members)


def refusal(inspection: Inspection) -> str:
    """Every defect, one a line."""
    count = "1 defect" if len(inspection.defects) == 1 else f"{len(inspection.defects)} defects"
    return f"{inspection.title}: {count}, nothing was written:" + "".join(f"\n  {d}" for d in inspection.defects)
