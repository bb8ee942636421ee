"""A case on the network's grid, and the way back to the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel import aff2axcodes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from numpy.typing import NDArray
from torch import Tensor

from masksam_nnunet.errors import CaseError, ExplainError
from masksam_nnunet.plans.image_reading import Grid

from ..cases import Case, preprocess_case
from ..label_maps import Classes, check_values, read_label_map
from ..predictor import MaskSAMPredictor
from .case import CaseFiles
from .overlays import affine_of

_VOXEL_AXES = "kji"  # of the source file, for nnU-Net's array axes
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))


@dataclass(frozen=True)
class Volume:
    """A preprocessed case. (D, H, W) is the network's grid: transposed, cropped to what is not zero, resampled.

    Attributes:
        data: (C, D, H, W) float32, what the network is given.
        label: (D, H, W) label values, -1 outside the crop's non-zero part; or None.
        properties: nnU-Net's.
        predictor: whose plans made it.
    """

    data: Tensor
    label: NDArray[np.int16] | None
    properties: Mapping[str, Any]
    predictor: MaskSAMPredictor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)"""
        depth, height, width = self.data.shape[1:]
        return depth, height, width

    @property
    def image(self) -> NDArray[np.float32]:
        """(D, H, W), the first channel."""
        return self.data[0].numpy()

    @property
    def axes(self) -> tuple[int, int, int]:
        """The source array's axis along each of (D, H, W)."""
        first, second, third = self.predictor.plans_manager.transpose_forward
        return int(first), int(second), int(third)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres along (D, H, W)."""
        depth, height, width = _spacing(self.predictor, self.properties)
        return float(depth), float(height), float(width)

    @property
    def kept(self) -> range:
        """The source's slices, along its own axis of D, that the network sees; the others are all zero."""
        start, stop = self.properties["bbox_used_for_cropping"][0]
        return range(int(start), int(stop))

    @property
    def source_slices(self) -> int:
        """How many slices the source has along the axis of D."""
        return int(self.properties["shape_before_cropping"][0])

    @property
    def slice_axis(self) -> str:
        """The source's voxel axis along D: i, j or k."""
        return _VOXEL_AXES[self.axes[0]]

    @property
    def directions(self) -> tuple[str, str, str] | None:
        """Where rising indices along (D, H, W) lead: one of L R A P S I each; None where the source does not say."""
        affine = affine_of(self.properties)
        if affine is None:
            return None
        codes = aff2axcodes(affine)
        depth, height, width = (str(codes[2 - axis]) for axis in self.axes)
        return depth, height, width

    def network_slice(self, index: int) -> int:
        """The network's slice whose centre is nearest to that of a source's slice."""
        place = (index - self.kept.start + 0.5) * self.shape[0] / len(self.kept)
        return min(int(place), self.shape[0] - 1)

    def segmentation(self, logits: Tensor) -> NDArray[np.integer[Any]]:
        """What nnU-Net makes of (K, D, H, W) logits: label values on the source's grid."""
        predictor = self.predictor
        result: NDArray[np.integer[Any]] = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            dict(self.properties),
            num_threads_torch=torch.get_num_threads(),
        )
        return result

    def to_source(self, array: NDArray[Any], whole_numbers: bool = False) -> NDArray[Any]:
        """Bring (D, H, W) to the source's grid by nnU-Net's own resampling; 0 outside the crop."""
        settings = self.predictor.configuration_manager
        resample = settings.resampling_fn_seg if whole_numbers else settings.resampling_fn_probabilities
        wanted = self.properties["shape_after_cropping_and_before_resampling"]
        original = _original_spacing(self.predictor, self.properties)
        back = np.asarray(resample(array[None].astype(np.float32), wanted, list(self.spacing), original))[0]
        full = np.zeros(self.properties["shape_before_cropping"], np.float32)
        full = insert_crop_into_image(full, back, self.properties["bbox_used_for_cropping"])
        back = full.transpose(self.predictor.plans_manager.transpose_backward)
        return np.rint(back).astype(array.dtype) if whole_numbers else back


def read_case(predictor: MaskSAMPredictor, files: CaseFiles, classes: Classes, previous: Path | None) -> Volume:
    """Read and preprocess a case as nnU-Net does for prediction.

    Args:
        predictor: of the model.
        files: of the case.
        classes: of the model.
        previous: a cascade's label map of the stage before.

    Raises:
        ExplainError: an image cannot be used (see :func:`..predict_cases.read_case`), or the label lies elsewhere.
        LabelMapError: the label is damaged or holds other values than the model's dataset.json.
    """
    description = predictor.dataset_json
    plans, settings = predictor.plans_manager, predictor.configuration_manager
    case = Case(files.name, files.images, files.numbered)
    try:
        data, properties = preprocess_case(case, previous, plans, settings, description, verbose=False)
    except CaseError as error:
        raise ExplainError(f"case {files.name!r}: {error}") from error
    truth = None if files.label is None else _read_label(files.name, files.label, classes, predictor, properties)
    label = None if truth is None else _to_network(truth, predictor, properties, data.shape[1:])
    return Volume(torch.from_numpy(data), label, properties, predictor)


def picture_edges(directions: Sequence[str]) -> dict[str, str]:
    """The letters for the edges of a picture whose (rows, columns) lead to ``directions``."""
    rows, columns = directions
    return {"top": _OPPOSITE[rows], "bottom": rows, "left": _OPPOSITE[columns], "right": columns}


def _read_label(
    case: str, label: Path, classes: Classes, predictor: MaskSAMPredictor, properties: Mapping[str, Any]
) -> NDArray[np.integer[Any]]:
    """The label map on the source's grid, (D, H, W) of nnU-Net's reader."""
    ending = predictor.dataset_json["file_ending"]
    if not label.name.endswith(ending):
        raise ExplainError(f"--label {label}: must end in {ending!r}, as all files of this dataset; convert it")
    read = read_label_map(label.parent, label.name.removesuffix(ending), predictor.dataset_json)
    check_values(label, case, read, classes)
    backward = predictor.plans_manager.transpose_backward
    shape = [int(properties["shape_before_cropping"][axis]) for axis in backward]
    image = Grid.of(np.broadcast_to(0, (1, *shape)), properties)
    difference = image.difference(read.grid)
    if difference is not None:
        what, one, other = difference
        raise ExplainError(
            f"{label}: its {what} is {other}, the image's {one}; name the label map that was drawn on this image "
            "(--label), or resample it to the image's grid"
        )
    return read.labels


def _to_network(
    truth: NDArray[np.integer[Any]], predictor: MaskSAMPredictor, properties: Mapping[str, Any], shape: Sequence[int]
) -> NDArray[np.int16]:
    """A label as nnU-Net preprocesses it for training."""
    turned = truth.transpose(predictor.plans_manager.transpose_forward)
    cropped = turned[tuple(slice(start, stop) for start, stop in properties["bbox_used_for_cropping"])]
    resample = predictor.configuration_manager.resampling_fn_seg
    original = _original_spacing(predictor, properties)
    result = resample(cropped[None].astype(np.float32), tuple(shape), original, list(_spacing(predictor, properties)))
    return np.rint(np.asarray(result)[0]).astype(np.int16)


def _original_spacing(predictor: MaskSAMPredictor, properties: Mapping[str, Any]) -> list[float]:
    return [float(properties["spacing"][axis]) for axis in predictor.plans_manager.transpose_forward]


def _spacing(predictor: MaskSAMPredictor, properties: Mapping[str, Any]) -> list[float]:
    """Of the network's grid; a 2D configuration keeps the distance of slices."""
    spacing = [float(step) for step in predictor.configuration_manager.spacing]
    return spacing if len(spacing) == 3 else [_original_spacing(predictor, properties)[0], *spacing]
