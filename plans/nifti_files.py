"""Check that an image file is whole and its NIfTI header sane, before a reader allocates what the header claims.

ITK, which reads these files for nnU-Net, fills what is missing with noise, takes NaN for 0 and a voxel size of 0 for 1,
and allocates whatever the header says.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast

import nibabel
import numpy as np
import psutil
from numpy.typing import NDArray

ENDINGS = (".nii", ".nii.gz")
_BLOCK = 1 << 22
_HEAD = 544  # NIfTI-2's header and the flag of its extensions
_FORMS = {348: (nibabel.Nifti1Image, b"n+1\0", 352), 540: (nibabel.Nifti2Image, b"n+2\0", _HEAD)}
"""By the header's length: nibabel's class, the mark of a file that holds its data too, the first byte they can have."""


class DamagedFileError(ValueError):
    """An image file is cut off or damaged, or its header is impossible. The message does not name the file."""


def check_whole(path: Path) -> None:
    """Refuse a file that is cut off or damaged, gzipped or NIfTI, and an impossible NIfTI header.

    The file is read to its end, a block at a time. Other formats are not looked into.

    Raises:
        DamagedFileError: what is wrong, in a few words.
        OSError: the file cannot be opened.
    """
    with _opened(path) as stream:
        try:
            head = stream.read(_HEAD)
            length = len(head)
            while block := stream.read(_BLOCK):
                length += len(block)
        except (OSError, EOFError, zlib.error) as error:  # gzip's own is an OSError
            raise DamagedFileError(" ".join(str(error).split()) or type(error).__name__) from error
    if is_nifti(path):
        _check_header(head, length)


def stored_floats(path: Path) -> NDArray[np.floating[Any]]:
    """What a NIfTI file of floating point numbers holds, else nothing: ITK reads NaN and infinity as 0.

    The file must have passed :func:`check_whole`.
    """
    if not is_nifti(path):
        return np.empty(0)
    with _opened(path) as stream:
        form, _ = _form(stream.read(_HEAD))
        stream.seek(0)
        stored: Any = form.from_stream(stream).dataobj
        return np.asanyarray(stored) if np.issubdtype(stored.dtype, np.floating) else np.empty(0)


def is_nifti(path: Path) -> bool:
    """Whether the file is one by its name."""
    return path.name.endswith(ENDINGS)


def _opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    """The file, decompressed; by its content, not its name: ITK reads plain files that end in .gz too."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(AbstractContextManager[IO[bytes]], gzip.open(path) if compressed else path.open("rb"))


def _form(head: bytes) -> tuple[Any, int]:
    """nibabel's class for a file that begins with ``head``, and where its data begin at the earliest."""
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    for size, (form, mark, earliest) in _FORMS.items():
        if size in sizes and len(head) >= earliest:
            magic = head[344:348] if size == 348 else head[4:8]
            if magic == mark:
                return form, earliest
    raise DamagedFileError(f"it has no NIfTI header with the data behind it, but begins with {head[:20]!r}")


def _check_header(head: bytes, length: int) -> None:
    """Refuse an impossible header, and one that claims more than ``length`` bytes."""
    form, earliest = _form(head)
    header = form.header_class.from_fileobj(io.BytesIO(head), check=False)
    dimensions = [int(size) for size in header["dim"]]
    shape = tuple(dimensions[1 : dimensions[0] + 1])
    if not 1 <= dimensions[0] <= 7 or min(shape) < 1:
        raise DamagedFileError(f"its header has the dimensions {dimensions}")
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError) as error:
        raise DamagedFileError(f"its header has the unknown data type {int(header['datatype'])}") from error
    if dtype.kind not in "iuf":
        raise DamagedFileError(f"its voxels are {dtype}, not numbers")
    offset = float(header["vox_offset"])
    if not math.isfinite(offset) or offset < earliest:
        raise DamagedFileError(f"its header says that voxels begin at byte {offset:g}, before the header's end")
    voxels, grid = math.prod(shape), " x ".join(map(str, shape))
    needed = int(offset) + voxels * dtype.itemsize
    if needed > length:
        raise DamagedFileError(f"it holds {length} bytes, its header says {needed} ({grid} voxels)")
    memory = psutil.virtual_memory().total
    if 4 * voxels > memory:  # float32, as nnU-Net reads it
        raise DamagedFileError(f"{grid} voxels do not fit into this machine's {memory} bytes of memory")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isfinite(slope) and slope != 0 and not math.isfinite(intercept):
        raise DamagedFileError(f"its header scales voxels by {slope:g} and adds {intercept:g}")
    steps = [float(step) for step in header["pixdim"][1 : min(len(shape), 3) + 1]]
    if not all(math.isfinite(step) and step != 0 for step in steps):
        raise DamagedFileError(f"its header has the voxel size {steps}")
    if not np.isfinite(_placement(header)).all():
        raise DamagedFileError("its header places the image at NaN or infinity")


def _placement(header: Any) -> NDArray[np.floating[Any]]:
    """What the header says of origin and direction, as far as it says that this counts."""
    names = ["srow_x", "srow_y", "srow_z"] if int(header["sform_code"]) > 0 else []
    if int(header["qform_code"]) > 0:
        names += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
    return np.concatenate([np.ravel(header[name]) for name in names] or [np.zeros(1)])
