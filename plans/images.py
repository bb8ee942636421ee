"""Images and label maps as nnU-Net reads them; damaged files are refused before a reader sees them.

ITK, which reads NIfTI files for nnU-Net, fills missing bytes with noise, reads NaN as 0 and a voxel size of 0 as 1, and
allocates whatever the header says.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import nibabel
import numpy as np
import psutil
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from masksam_nnunet.errors import DataError, in_short

_BLOCK = 1 << 22
_HEAD = 544  # NIfTI-2's header and its extension flag
_FORMS = {348: (nibabel.Nifti1Image, b"n+1\0", 352), 540: (nibabel.Nifti2Image, b"n+2\0", _HEAD)}
"""nibabel's class, the magic bytes of a single-file NIfTI, and the first possible data byte, by header length."""
_LARGEST_LABEL = 2**24  # nnU-Net reads float32, which represents no larger whole numbers exactly
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class ImageGeometry:
    """Where voxels lie.

    Attributes:
        shape: (D, H, W).
        spacing: millimetres along (D, H, W).
        placement: origin and direction as the reader gives them, by name; empty for formats without.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    placement: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, array: NDArray[Any], properties: Mapping[str, Any]) -> ImageGeometry:
        """The geometry of what nnU-Net's readers return: (C, D, H, W) and its properties."""
        placement: dict[str, NDArray[np.float64]] = {}
        if "sitk_stuff" in properties:
            placement = {name: np.asarray(properties["sitk_stuff"][name], float) for name in ("origin", "direction")}
        elif "nibabel_stuff" in properties:
            placement = {"affine": np.asarray(properties["nibabel_stuff"]["original_affine"], float)}
        return cls(array.shape[1:], tuple(float(step) for step in properties["spacing"]), placement)

    def difference(self, other: ImageGeometry) -> tuple[str, object, object] | None:
        """What differs by more than rounding in headers, with both values; None if nothing does."""
        if self.shape != other.shape:
            return "shape", self.shape, other.shape
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3, atol=1e-4):
            return "spacing", self.spacing, other.spacing
        for name in self.placement.keys() & other.placement.keys():
            one, two = self.placement[name], other.placement[name]
            tolerance = 1e-3 if name == "direction" else 0.05  # millimetres
            if one.shape != two.shape or not np.allclose(one, two, rtol=1e-4, atol=tolerance):
                return name, one.tolist(), two.tolist()
        return None


def read_image(path: Path, dataset_json: Mapping[str, Any]) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """An image, or one channel of it, as nnU-Net's reader for the dataset gives it: (C, D, H, W), and its properties.

    A DataError says that it is damaged, or that no reader can read it.
    """
    return _read(path, dataset_json, lambda reader: reader.read_images([str(path)]))


def read_labels(path: Path, dataset_json: Mapping[str, Any]) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """Read a label map like :func:`read_image`; its values are finite and nearly whole.

    Raises:
        DataError: it is damaged, no reader can read it, or it holds other numbers.
    """
    array, properties = _read(path, dataset_json, lambda reader: reader.read_seg(str(path)))
    for values in (array, stored_floats(path)):
        with np.errstate(invalid="ignore"):  # inf - inf
            # Scaling in a header leaves 0.9999, but 0.5 is a probability.
            odd = values[~((np.abs(values - np.rint(values)) < 0.01) & (np.abs(values) < _LARGEST_LABEL))]
        if odd.size:
            raise DataError(f"{path} is not a label map: {odd.size} voxels are not whole numbers, such as {odd[0]}")
    return array, properties


def check_whole(path: Path) -> None:
    """Refuse a gzipped or NIfTI file that is cut off or damaged, and an impossible NIfTI header.

    The file is read to its end, a block at a time. Other formats are not checked.

    Raises:
        DataError: what is wrong.
        OSError: the file cannot be opened.
    """
    with _open(path) as stream:
        try:
            head = stream.read(_HEAD)
            length = len(head)
            while block := stream.read(_BLOCK):
                length += len(block)
            wrong = _header_defect(head, length) if is_nifti(path) else None
        except (OSError, EOFError, zlib.error) as error:  # gzip's own is an OSError
            wrong = in_short(error)
    if wrong:
        raise DataError(f"{path} is cut off or damaged: {wrong}")


def stored_floats(path: Path) -> NDArray[np.floating[Any]]:
    """The floating point numbers that a NIfTI file stores, else an empty array: ITK reads NaN and infinity as 0.

    The file must have passed :func:`check_whole`.
    """
    if not is_nifti(path):
        return np.empty(0)
    with _open(path) as stream:
        form, _ = _form(stream.read(_HEAD)) or (nibabel.Nifti1Image, 0)
        stream.seek(0)
        stored: Any = form.from_stream(cast(IOBase, stream)).dataobj
        return np.asanyarray(stored) if np.issubdtype(stored.dtype, np.floating) else np.empty(0)


def count_non_finite(path: Path, array: NDArray[np.floating[Any]]) -> int:
    """How many voxels are NaN or infinite in what a reader made of a file, or in the file itself."""
    return max(int(np.count_nonzero(~np.isfinite(values))) for values in (array, stored_floats(path)))


def label_values(labels: NDArray[np.integer[Any]]) -> set[int]:
    """The different values of a label map; small ones are counted, which is faster than sorting."""
    small = labels.size > 0 and labels.min() >= 0 and labels.max() < 1024
    found = np.flatnonzero(np.bincount(labels.ravel())) if small else np.unique(labels)
    return set(found.tolist())


def is_nifti(path: Path) -> bool:
    """Whether the file's name is a NIfTI file's."""
    return path.name.endswith((".nii", ".nii.gz"))


def open_nifti(path: Path) -> nibabel.Nifti1Image:
    """The image in a file, its values not yet read; errors are nibabel's, ValueError for another format."""
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise ValueError(f"not a NIfTI file but {type(image).__name__}")
    return image


def in_threads(function: Callable[[_In], _Out], items: Sequence[_In], what: str | None = None) -> list[_Out]:
    """``function`` of each item, in order; with a progress bar on a terminal if ``what`` names it.

    Threads suffice, since decompression and NumPy release the interpreter's lock. Few: each may hold a volume.
    """
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        hidden = what is None or not console.is_terminal
        return list(track(results, what or "", len(items), console=console, disable=hidden))


_ONE_AT_A_TIME = threading.Lock()  # redirecting stderr from two threads would lose it


def _read(path: Path, dataset_json: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    try:
        check_whole(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    description = dict(dataset_json)
    try:
        # Without the file as an example: nnU-Net would read it once more to try.
        return read(determine_reader_writer_from_dataset_json(description, verbose=False)())
    except MemoryError:
        raise
    except Exception as error:  # each reader has errors of its own
        try:
            # nnU-Net prints a traceback for each reader that fails.
            with _ONE_AT_A_TIME, contextlib.redirect_stderr(io.StringIO()):
                other = determine_reader_writer_from_dataset_json(description, str(path), verbose=False)()
            return read(other)
        except Exception:
            raise DataError(
                f"{path} cannot be read: is it damaged, or in another format than its name says? ({in_short(error)})"
            ) from error


def _open(path: Path) -> AbstractContextManager[IO[bytes]]:
    """The file, decompressed; by its content, not its name: ITK reads plain files that end in .gz too."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(AbstractContextManager[IO[bytes]], gzip.open(path) if compressed else path.open("rb"))


def _form(head: bytes) -> tuple[Any, int] | None:
    """nibabel's class and the first possible data byte of a file that begins with ``head``; None for no NIfTI."""
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    for size, (form, mark, earliest) in _FORMS.items():
        if size in sizes and len(head) >= earliest and mark == (head[344:348] if size == 348 else head[4:8]):
            return form, earliest
    return None


def _header_defect(head: bytes, length: int) -> str | None:
    """What is wrong with the header of a NIfTI file of ``length`` bytes."""
    found = _form(head)
    if found is None:
        return f"it has no NIfTI header with the data behind it, but begins with {head[:20]!r}"
    form, earliest = found
    header = form.header_class.from_fileobj(io.BytesIO(head), check=False)
    dimensions = [int(size) for size in header["dim"]]
    shape = tuple(dimensions[1 : dimensions[0] + 1])
    if not 1 <= dimensions[0] <= 7 or min(shape) < 1:
        return f"its header has the dimensions {dimensions}"
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError):
        return f"its header has the unknown data type {int(header['datatype'])}"
    if dtype.kind not in "iuf":
        return f"its voxels are {dtype}, not numbers"
    offset, slope, intercept = (float(header[name]) for name in ("vox_offset", "scl_slope", "scl_inter"))
    if not math.isfinite(offset) or offset < earliest:
        return f"its header says that voxels begin at byte {offset:g}"
    needed = int(offset) + math.prod(shape) * dtype.itemsize
    if needed > length:
        return f"it holds {length} bytes, its header says {needed} for the shape {shape}"
    if 4 * math.prod(shape) > psutil.virtual_memory().total:  # float32, as nnU-Net reads it
        return f"the shape {shape} does not fit into this machine's memory"
    steps = header["pixdim"][1 : min(len(shape), 3) + 1]
    placement = np.concatenate([steps, _placement(header)])
    scaled = math.isfinite(slope) and slope != 0
    if not np.isfinite(placement).all() or not all(steps) or (scaled and not math.isfinite(intercept)):
        return (
            f"its header scales voxels by {slope:g}, adds {intercept:g}, and places the image by {placement.tolist()}"
        )
    return None


def _placement(header: Any) -> NDArray[np.floating[Any]]:
    """The header's values for origin and direction, as far as its codes make them count."""
    names = ["srow_x", "srow_y", "srow_z"] if int(header["sform_code"]) > 0 else []
    if int(header["qform_code"]) > 0:
        names += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
    return np.concatenate([np.ravel(header[name]) for name in names] or [np.zeros(1)])
