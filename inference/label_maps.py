"""Label maps as nnU-Net reads them, and the classes a dataset.json declares."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray


class LabelMapError(ValueError):
    """A label map is missing, damaged or not of this dataset, or does not lie on the same grid as another."""


@dataclass(frozen=True)
class Classes:
    """What is scored, and how nnU-Net names it.

    Attributes:
        foreground: label values of each class or region by name, in the order of nnU-Net's network outputs; without
            background.
        has_regions: whether classes are regions, which may overlap.
        ignore_label: value of voxels that do not count, or None.
    """

    foreground: Mapping[str, tuple[int, ...]]
    has_regions: bool
    ignore_label: int | None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> Classes:
        """Read the labels of a dataset.json by nnU-Net's rules."""
        manager = LabelManager(dict(dataset_json["labels"]), dataset_json.get("regions_class_order"))
        named = {
            name: tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else (value,)))
            for name, value in dataset_json["labels"].items()
            if name != "ignore"
        }
        foreground = {name: values for name, values in named.items() if set(values) != {0}}
        if not manager.has_regions:  # nnU-Net orders labels by value, regions as they are written
            foreground = dict(sorted(foreground.items(), key=lambda item: item[1]))
        return cls(foreground, manager.has_regions, manager.ignore_label)

    @property
    def heads(self) -> list[str]:
        """Name of each channel of the network's output."""
        return list(self.foreground) if self.has_regions else ["background", *self.foreground]

    @property
    def values(self) -> list[int]:
        """All label values that may occur, background and the ignore label among them."""
        found = {0, *(value for values in self.foreground.values() for value in values)}
        return sorted(found | ({self.ignore_label} if self.ignore_label is not None else set()))


@dataclass(frozen=True)
class Grid:
    """Where voxels lie.

    Attributes:
        shape: (D, H, W).
        spacing: millimetres along (D, H, W).
        placement: what the reader tells of origin and direction, by name; empty for formats without.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    placement: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, array: NDArray[Any], properties: Mapping[str, Any]) -> Grid:
        """The grid of what nnU-Net's readers return: (C, D, H, W) and its properties."""
        return cls(array.shape[1:], tuple(float(step) for step in properties["spacing"]), _placement(properties))

    def difference(self, other: Grid) -> tuple[str, object, object] | None:
        """What differs by more than headers round, and both values; None if nothing does."""
        if self.shape != other.shape:
            return "shape", self.shape, other.shape
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3, atol=1e-4):
            return "spacing", self.spacing, other.spacing
        for name in self.placement.keys() & other.placement.keys():
            one, two = self.placement[name], other.placement[name]
            # 0.05 mm: rounding in headers, not another position.
            if one.shape != two.shape or not np.allclose(
                one, two, rtol=1e-4, atol=0.05 if name != "direction" else 1e-3
            ):
                return name, one.tolist(), two.tolist()
        return None


@dataclass(frozen=True)
class LabelMap:
    """A segmentation with its grid.

    Attributes:
        labels: (D, H, W) whole numbers.
        spacing: millimetres along (D, H, W).
        placement: what the reader tells of origin and direction, by name; empty for formats without.
    """

    labels: NDArray[np.integer[Any]]
    spacing: tuple[float, float, float]
    placement: Mapping[str, NDArray[np.float64]]

    @property
    def grid(self) -> Grid:
        return Grid(self.labels.shape, self.spacing, self.placement)


def read_volume(files: Sequence[Path], dataset_json: Mapping[str, Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Read an image (one file per channel) by the dataset's own reader; (C, D, H, W) and nnU-Net's properties."""
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), str(files[0]), verbose=False)()
    array, properties = reader.read_images([str(file) for file in files])
    return array, properties


def read_label_map(folder: Path, case: str, dataset_json: Mapping[str, Any]) -> LabelMap:
    """Read ``CASE`` + file_ending from a folder.

    Raises:
        LabelMapError: if the file is not there, cannot be read, or holds NaN or numbers that are not whole.
    """
    path = Path(folder) / (case + dataset_json["file_ending"])
    if not path.is_file():
        raise LabelMapError(f"case {case!r} has no label map: {path} does not exist")
    array, properties = _read_seg(path, case, dataset_json)
    depth, height, width = (float(step) for step in properties["spacing"])
    _check_labels(path, case, array[0])
    _check_labels(path, case, stored_floats(path))
    return LabelMap(np.rint(array[0]).astype(np.int32), (depth, height, width), _placement(properties))


def check_values(path: Path, case: str, label_map: LabelMap, classes: Classes) -> None:
    """Refuse label values that are not in dataset.json.

    Raises:
        LabelMapError: naming the case, the file, the values and those allowed.
    """
    known = np.isin(label_map.labels, classes.values)
    if not known.all():
        unknown = ", ".join(str(value) for value in np.unique(label_map.labels[~known])[:10])
        allowed = ", ".join(map(str, classes.values))
        raise LabelMapError(
            f"case {case!r}: {path} holds the label values {unknown}, but dataset.json has only {allowed}; use "
            "predictions of a model of this dataset, or the dataset.json that belongs to them"
        )


def check_same_geometry(case: str, truth: LabelMap, prediction: LabelMap) -> None:
    """Refuse to compare label maps of different grids.

    Raises:
        LabelMapError: naming the case, what differs and both values.
    """
    difference = truth.grid.difference(prediction.grid)
    if difference is not None:
        what, one, other = difference
        raise LabelMapError(
            f"case {case!r}: {what} of truth and prediction differ ({one} and {other}); "
            "predict from the same image files the truth was drawn on"
        )


def class_mask(labels: NDArray[np.integer[Any]], values: Sequence[int]) -> NDArray[np.bool_]:
    """Where a label map holds one of ``values``; same shape."""
    return np.isin(labels, list(values))


def _check_labels(path: Path, case: str, values: NDArray[np.floating[Any]]) -> None:
    """Refuse what no label map holds; scaling in a header leaves 0.9999, but 0.5 is a probability."""
    with np.errstate(invalid="ignore"):  # inf - inf
        odd = values[~(np.abs(values - np.rint(values)) < 0.01)]
    if odd.size:
        raise LabelMapError(
            f"case {case!r}: {path} is no label map: {odd.size} voxels are NaN, infinite or no whole numbers, such as "
            f"{odd[0]}; predict this case again, and give label maps, not probabilities"
        )


def stored_floats(path: Path) -> NDArray[np.floating[Any]]:
    """What a NIfTI file of floating point numbers holds, else nothing: ITK reads NaN and infinity as 0."""
    stored = _nifti_data(path)
    if stored is None or not np.issubdtype(stored.dtype, np.floating):
        return np.empty(0)
    return np.asanyarray(stored)


def _nifti_data(path: Path) -> Any:
    """nibabel's view of the voxels, of which only the header has been read; None for what it cannot read."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return None
    try:
        image: Any = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, zlib.error):  # ITK reads more than nibabel does
        return None
    return image.dataobj


_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def _read_seg(
    path: Path, case: str, dataset_json: Mapping[str, Any]
) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """The label map (1, D, H, W) and nnU-Net's properties, by the first of its readers that can read the file."""
    try:
        check_whole(path)
        # Without the file as an example: nnU-Net would read it once more only to try.
        return _reader(dataset_json).read_seg(str(path))
    except MemoryError:
        raise
    except _DAMAGED as error:
        raise _unreadable(path, case, error) from error
    except Exception as error:  # each reader has errors of its own
        try:
            return _reader(dataset_json, str(path)).read_seg(str(path))
        except Exception:
            raise _unreadable(path, case, error) from error


def _reader(dataset_json: Mapping[str, Any], example: str | None = None) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each reader that fails
        return determine_reader_writer_from_dataset_json(dict(dataset_json), example, verbose=False)()


def check_whole(path: Path) -> None:
    """Refuse a file that is cut off or damaged, gzipped or NIfTI: ITK fills what it cannot read with noise.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error, OSError: what is wrong.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"  # not by name: ITK reads plain files that end in .gz too
    size = path.stat().st_size
    if compressed:
        size = 0
        with gzip.open(path) as stream:
            while block := stream.read(1 << 22):
                size += len(block)
    stored = _nifti_data(path)
    if stored is not None:
        needed = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
        if size < needed:
            raise EOFError(f"it holds {size} bytes where its header tells of {needed}")


def _unreadable(path: Path, case: str, error: Exception) -> LabelMapError:
    reason = " ".join(str(error).split())[-300:] or repr(error)
    return LabelMapError(
        f"case {case!r}: {path} cannot be read; it is truncated, damaged or of another format than its name says: "
        f"make it again, or copy it anew ({reason})"
    )


def _placement(properties: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    if "sitk_stuff" in properties:
        return {name: np.asarray(properties["sitk_stuff"][name], dtype=float) for name in ("origin", "direction")}
    if "nibabel_stuff" in properties:
        return {"affine": np.asarray(properties["nibabel_stuff"]["original_affine"], dtype=float)}
    return {}
