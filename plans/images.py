"""Images and label maps as nnU-Net reads them; damaged files are refused before a reader sees them.

ITK, which reads NIfTI files for nnU-Net, fills missing bytes with noise, reads NaN as 0 and a voxel size of 0 as 1, and
allocates whatever the header says. Of a damaged MetaImage file (.mha) it returns what it has.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
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
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.progress import track

from masksam_nnunet.environment import cores
from masksam_nnunet.errors import DataError, in_short
from masksam_nnunet.files import read_json

_BLOCK = 1 << 22
_HEAD = 544  # NIfTI-2's header and its extension flag
_FORMS = {348: (nibabel.Nifti1Image, b"n+1\0", 352), 540: (nibabel.Nifti2Image, b"n+2\0", _HEAD)}
"""nibabel's class, the magic bytes of a single-file NIfTI, and the first possible data byte, by header length."""
_LARGEST_LABEL = 2**24  # nnU-Net reads float32, which represents no larger whole numbers exactly
_LARGEST_VALUE = 1e15  # nnU-Net squares and sums values in float32, which ends at 3e38
_META_HEADER = 1 << 16  # bytes of a MetaImage file in which its header must end
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
            placement = {"affine": nibabel_affine(properties)}
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


def nibabel_affine(properties: Mapping[str, Any]) -> NDArray[np.float64]:
    """The affine of an array that nnU-Net's nibabel readers return: NibabelIOWithReorient has turned it."""
    stuff = properties["nibabel_stuff"]
    return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float)


def dataset_reader(dataset_json: Mapping[str, Any], example: Path) -> BaseReaderWriter:
    """The reader that nnU-Net takes for all files of a dataset: the first that can read its first image.

    Raises:
        DataError: none can, or it is damaged.
        OSError: it cannot be opened.
    """
    check_whole(example)
    try:
        # nnU-Net prints a traceback for each reader that fails.
        with _ONE_AT_A_TIME, contextlib.redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_dataset_json(dict(dataset_json), str(example), verbose=False)()
    except Exception as error:
        raise DataError(f"{example} cannot be read by any of nnU-Net's readers ({in_short(error)})") from error


def read_image(
    path: Path, dataset_json: Mapping[str, Any], reader: BaseReaderWriter | None = None
) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """An image, or one channel of it, as nnU-Net's reader gives it: (C, D, H, W), and its properties.

    A file that holds channels along a fourth axis has the properties of one of them: nnU-Net's writer refuses others.

    Args:
        path: the file.
        dataset_json: names the format.
        reader: that of the dataset or model; None to take the first that can read this file.

    Raises:
        DataError: it is damaged, its reader cannot read it, its voxels have no size, or values cannot be used.
    """
    array, properties = _read(path, dataset_json, lambda found: found.read_images([str(path)]), reader)
    if odd := max(map(_unusable, (array, stored_floats(path)))):
        raise DataError(
            f"{path} holds {odd} voxels that are NaN, infinite or beyond {_LARGEST_VALUE:g}, where nnU-Net's "
            "normalisation ends in NaN; replace them"
        )
    return array, properties


def read_labels(
    path: Path, dataset_json: Mapping[str, Any], reader: BaseReaderWriter | None = None
) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """Read a label map (1, D, H, W) like :func:`read_image`; its values are finite and nearly whole.

    Raises:
        DataError: it is damaged, its reader cannot read it, or it holds other numbers or several channels.
    """
    array, properties = _read(path, dataset_json, lambda found: found.read_seg(str(path)), reader)
    if len(array) != 1:
        raise DataError(
            f"{path} is not a label map: it has {len(array)} channels (colours, or one for each class); write one "
            "channel of label numbers"
        )
    for values in (array, stored_floats(path)):
        with np.errstate(invalid="ignore"):  # inf - inf
            # Scaling in a header leaves 0.9999, but 0.5 is a probability.
            odd = values[~((np.abs(values - np.rint(values)) < 0.01) & (np.abs(values) < _LARGEST_LABEL))]
        if odd.size:
            raise DataError(f"{path} is not a label map: {odd.size} voxels are not whole numbers, such as {odd[0]}")
    return array, properties


def check_whole(path: Path) -> None:
    """Refuse a gzipped, NIfTI or MetaImage (.mha) file that is cut off or damaged, and an impossible NIfTI header.

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
    if path.name.lower().endswith(".mha"):
        wrong = wrong or _meta_image_defect(path)
    if wrong:
        raise DataError(f"{path} is cut off or damaged: {wrong}")


def twice_placed(path: Path) -> str | None:
    """What is wrong with a NIfTI header whose two placements, sform and qform, are half a voxel apart or more."""
    if not is_nifti(path):
        return None
    with _open(path) as stream:
        head = stream.read(_HEAD)
    form, _ = _form(head) or (nibabel.Nifti1Image, 0)
    header = form.header_class.from_fileobj(io.BytesIO(head), check=False)
    try:
        (sform, _), (qform, _) = header.get_sform(coded=True), header.get_qform(coded=True)
    except (ValueError, nibabel.spatialimages.HeaderDataError):  # quaternions that are none
        return None
    if sform is None or qform is None:
        return None
    shape = np.array([*header.get_data_shape()[:3], 1, 1])[:3]
    corners = np.array([*np.ndindex(2, 2, 2)]) * (shape - 1)  # (8, 3)
    apart = np.linalg.norm(np.c_[corners, np.ones(8)] @ (sform - qform)[:3].T, axis=1).max()
    if apart < 0.5 * min(header.get_zooms()[:3]):
        return None
    return (
        f"{path} is placed twice by its header, up to {apart:.3g} mm apart (sform and qform): programs differ in which "
        "they follow; correct the header"
    )


def times_apart(spacing: ArrayLike, other: ArrayLike) -> float:
    """The largest factor between two spacings along an axis, at least 1."""
    return float(np.exp(np.abs(np.log(np.divide(spacing, other))).max()))


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
    with ThreadPoolExecutor(min(4, cores())) as pool:
        results = pool.map(function, items)
        hidden = what is None or not console.is_terminal
        return list(track(results, what or "", len(items), console=console, disable=hidden))


_ONE_AT_A_TIME = threading.Lock()  # redirecting stderr from two threads would lose it


def _read(
    path: Path, dataset_json: Mapping[str, Any], read: Callable[[Any], Any], reader: BaseReaderWriter | None
) -> tuple[Any, dict[str, Any]]:
    try:
        check_whole(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        # Without the file as an example: nnU-Net would read it once more to try.
        array, properties = read(
            reader or determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False)()
        )
    except MemoryError:
        raise
    except Exception as error:  # each reader has errors of its own
        try:
            if reader is not None:
                raise
            array, properties = read(dataset_reader(dataset_json, path))
        except Exception:
            its = f" by {type(reader).__name__}, which reads the whole dataset" if reader else ""
            raise DataError(
                f"{path} cannot be read{its}: is it damaged, or in another format than its name says? "
                f"({in_short(error)})"
            ) from error
    if "sitk_stuff" in properties and len(properties["spacing"]) == 2:  # SimpleITK's last axis is the vector's
        raise DataError(f"{path} has vectors or colours as voxels; give each channel a file of its own")
    try:
        beside = path.with_suffix(".json")  # nnU-Net looks for CASE.json beside CASE_0000.tif
        if path.suffix.lower() in Tiff3DIO.supported_file_endings and beside.is_file():
            properties["spacing"] = read_json(beside)["spacing"]
        sound = len(properties["spacing"]) == 3 and all(0 < float(step) < math.inf for step in properties["spacing"])
    except (TypeError, ValueError, LookupError):
        sound = False
    if not sound:
        raise DataError(f"{path} has voxels of the size {properties['spacing']}: three positive numbers are needed")
    return array, _of_one_channel(properties)


def _of_one_channel(properties: dict[str, Any]) -> dict[str, Any]:
    """SimpleITK's properties without the axis of channels."""
    stuff = properties.get("sitk_stuff", {})
    if len(stuff.get("spacing", ())) != 4:
        return properties
    direction = np.reshape(stuff["direction"], (4, 4))[:3, :3]
    placed = {name: stuff[name][:3] for name in ("spacing", "origin")} | {"direction": tuple(direction.ravel())}
    return {**properties, "sitk_stuff": stuff | placed}


def _unusable(values: NDArray[np.floating[Any]]) -> int:
    """How many of them are NaN, infinite or too large."""
    if not values.size or (values.min() > -_LARGEST_VALUE and values.max() < _LARGEST_VALUE):  # false with NaN
        return 0
    return int(np.count_nonzero(~(np.abs(values) < _LARGEST_VALUE)))


def _meta_image_defect(path: Path) -> str | None:
    """What is wrong with a MetaImage file's header or compressed voxels.

    ITK fills damaged compressed data with zeros, silently. It checks the length of other data itself.
    """
    with path.open("rb") as stream:
        head = stream.read(_META_HEADER)
        end = head.find(b"\n", head.find(b"ElementDataFile"))
        if b"ElementDataFile" not in head or end < 0:
            return f"it has no MetaImage header, but begins with {head[:20]!r}"
        lines = (line.partition("=") for line in head[:end].decode("latin-1").splitlines())
        header = {key.strip(): value.strip() for key, _, value in lines}
        if header["ElementDataFile"] != "LOCAL":
            return f"its voxels are in another file, {header['ElementDataFile']}: .mha holds both"
        if header.get("CompressedData", "").lower() != "true":
            return None
        stream.seek(end + 1)
        voxels = zlib.decompressobj()
        try:
            while not voxels.eof and (block := voxels.unconsumed_tail or stream.read(_BLOCK)):
                voxels.decompress(block, _BLOCK)
        except zlib.error as error:
            return f"its compressed voxels are damaged ({error})"
        return None if voxels.eof else "its compressed voxels are cut off"


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
