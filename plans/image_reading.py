"""Images as nnU-Net reads them, and the grids they lie on; damaged files are refused first."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray

from .nifti_files import DamagedFileError, check_whole, stored_floats

_LARGEST_LABEL = 2**24  # float32, in which nnU-Net reads, holds no larger integers exactly


class ImageFileError(ValueError):
    """An image file cannot be used. The message names the file, what is wrong with it, and the remedy."""


class NotLabelsError(ImageFileError):
    """A label map holds values that are not labels."""


@dataclass(frozen=True)
class Grid:
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
    def of(cls, array: NDArray[Any], properties: Mapping[str, Any]) -> Grid:
        """The grid of what nnU-Net's readers return: (C, D, H, W) and its properties."""
        return cls(array.shape[1:], tuple(float(step) for step in properties["spacing"]), placement(properties))

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


def placement(properties: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Origin and direction in nnU-Net's properties of an image, by name; empty where its format has none."""
    if "sitk_stuff" in properties:
        return {name: np.asarray(properties["sitk_stuff"][name], dtype=float) for name in ("origin", "direction")}
    if "nibabel_stuff" in properties:
        return {"affine": np.asarray(properties["nibabel_stuff"]["original_affine"], dtype=float)}
    return {}


def read_image(path: Path, dataset_json: Mapping[str, Any]) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """A file by the first of nnU-Net's readers that can read it: (C, D, H, W) and nnU-Net's properties.

    Args:
        path: of the image, or of one of its channels.
        dataset_json: of its dataset, which decides the readers.

    Raises:
        ImageFileError: it is damaged, or none can.
    """
    return _read(path, dataset_json, lambda reader: reader.read_images([str(path)]))


def read_labels(path: Path, dataset_json: Mapping[str, Any]) -> tuple[NDArray[np.floating[Any]], dict[str, Any]]:
    """A label map as :func:`read_image` reads images; its values are finite and nearly whole.

    Raises:
        NotLabelsError: it holds other numbers.
        ImageFileError: it is damaged, or no reader can read it.
    """
    array, properties = _read(path, dataset_json, lambda reader: reader.read_seg(str(path)))
    for values in (array, stored_floats(path)):
        with np.errstate(invalid="ignore"):  # inf - inf
            # Scaling in a header leaves 0.9999, but 0.5 is a probability.
            odd = values[~((np.abs(values - np.rint(values)) < 0.01) & (np.abs(values) < _LARGEST_LABEL))]
        if odd.size:
            raise NotLabelsError(
                f"{path} is no label map: {odd.size} voxels are NaN, infinite or no whole numbers, such as {odd[0]}"
            )
    return array, properties


def _read(path: Path, dataset_json: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    try:
        check_whole(path)
        # Without the file as an example: nnU-Net would read it once more only to try.
        return read(_reader(dataset_json))
    except MemoryError:
        raise
    except DamagedFileError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # each reader has errors of its own
        try:
            return read(_reader(dataset_json, str(path)))
        except Exception:
            raise _unreadable(path, error) from error


_ONE_AT_A_TIME = threading.Lock()  # redirecting stderr from two threads would lose it


def _reader(dataset_json: Mapping[str, Any], example: str | None = None) -> Any:
    if example is None:
        return determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False)()
    with _ONE_AT_A_TIME, contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each that fails
        return determine_reader_writer_from_dataset_json(dict(dataset_json), example, verbose=False)()


def _unreadable(path: Path, error: Exception) -> ImageFileError:
    reason = " ".join(str(error).split())[-300:] or repr(error)
    return ImageFileError(
        f"{path} cannot be read; it is truncated, damaged or of another format than its name says: make it again, or "
        f"copy it again ({reason})"
    )
