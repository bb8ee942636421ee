"""The queries of single windows, and which query each voxel owes its class to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from numpy.typing import NDArray
from torch import Tensor

from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.compute import autocast
from masksam_nnunet.modeling.network import MaskSAMOutput
from masksam_nnunet.semantic import semantic_log_probabilities

from ..predictor import MaskSAMPredictor
from .prompts import read_prompts

Corner = tuple[int, int, int]


@dataclass(frozen=True)
class SliceQueries:
    """What each of the N queries of one slice of one window makes of it.

    Attributes:
        index: of the slice on the network's grid.
        window: number of the window, from 1.
        windows: how many there are.
        corner: (d, h, w) of the window's first voxel on the network's grid; negative where the volume was padded.
        size: (D, H, W) of the window.
        probabilities: (N, K + 1): of each class, "no object" last.
        boxes: (N, 4): auxiliary boxes x0 y0 x1 y1 in pixels of the window.
        drafts: (N, H, W): auxiliary masks as probabilities.
        masks: (N, H, W): final masks as probabilities.
        inside: rows and columns of the window that lie in the volume.
    """

    index: int
    window: int
    windows: int
    corner: Corner
    size: Corner
    probabilities: NDArray[np.float32]
    boxes: NDArray[np.float32]
    drafts: NDArray[np.float32]
    masks: NDArray[np.float32]
    inside: tuple[slice, slice]

    @property
    def volume_boxes(self) -> NDArray[np.float32]:
        """(N, 4): the boxes in pixels of the network's grid."""
        _, row, column = self.corner
        return self.boxes + np.array([column, row, column, row], np.float32)

    def shares(self, regions: bool) -> NDArray[np.float64]:
        """(N,) of the window's foreground score in this slice, Σ class·mask, each query's part; sums to 1, or all 0."""
        foreground = self.probabilities[:, 0 if regions else 1 : -1].sum(1).astype(float)
        scores = foreground * self.masks[:, *self.inside].sum((1, 2), dtype=float)
        return scores / scores.sum() if scores.sum() > 0 else scores


@dataclass(frozen=True)
class Queries:
    """Of one fold, unmirrored.

    Attributes:
        slices: for each of the wanted.
        owner: (D, H, W) number of the query, from 1, that gives a voxel most of its class in the window whose centre is
            nearest; 0 where that window finds background.
        windows: how many there are.
    """

    slices: Mapping[int, SliceQueries]
    owner: NDArray[np.uint8] | NDArray[np.uint16]


def run_windows(
    predictor: MaskSAMPredictor,
    network: MaskSAM,
    data: Tensor,
    centres: Mapping[int, tuple[float, float]],
    spacing: Sequence[float],
) -> Queries:
    """Run the network once on each of nnU-Net's windows.

    Args:
        predictor: knows the windows.
        network: holds a fold.
        data: (C, D, H, W).
        centres: (h, w) in each wanted slice that its window should be near to.
        spacing: millimetres along (D, H, W), by which near is meant.
    """
    patch = tuple(int(n) for n in predictor.configuration_manager.patch_size)
    padded, back = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
    offset = tuple(int(part.start or 0) for part in back[1:])
    corners = [_corner(window) for window in predictor._internal_get_sliding_window_slicers(padded.shape[1:])]
    size: Corner = (1, *patch) if len(patch) == 2 else patch  # type: ignore[assignment]
    chosen: dict[int, list[int]] = {}
    for index, centre in centres.items():
        place = (index + offset[0], centre[0] + offset[1], centre[1] + offset[2])
        chosen.setdefault(nearest_window(corners, size, place, spacing), []).append(index)

    regions = network.config.regions
    dtype = np.uint8 if network.config.num_queries < 256 else np.uint16
    owner = np.zeros(padded.shape[1:], dtype)
    nearness = np.full(padded.shape[1:], -1.0, np.float32)
    weight = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    weight = weight.float().numpy().reshape(size)
    network = network.to(predictor.device).eval()
    slices = {}
    for number, corner in enumerate(corners):
        where = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        window = padded[(slice(None), *where)]
        parts = run_parts(network, window[:, 0] if len(patch) == 2 else window, predictor.device)
        nearer = weight > nearness[where]
        nearness[where][nearer] = weight[nearer]
        owner[where][nearer] = owners(parts, regions).astype(dtype)[nearer]
        for index in chosen.get(number, ()):
            depth = index + offset[0] - corner[0]
            mine: Corner = tuple(start - by for start, by in zip(corner, offset, strict=True))  # type: ignore[assignment]
            slices[index] = _read(network, parts, depth, index, number, len(corners), mine, size, data.shape[1:])
    return Queries(slices, owner[back[1:]])


def nearest_window(corners: Sequence[Corner], size: Corner, place: Sequence[float], spacing: Sequence[float]) -> int:
    """Of the windows that hold the slice of ``place``, the one whose centre is nearest to it in space."""
    holding = [n for n, corner in enumerate(corners) if corner[0] <= place[0] < corner[0] + size[0]]

    def distance(number: int) -> float:
        centre = np.array(corners[number]) + (np.array(size) - 1) / 2
        return float((((centre - np.array(place)) * np.array(spacing)) ** 2).sum())

    return min(holding, key=distance)


@torch.inference_mode()
def run_parts(network: MaskSAM, window: Tensor, device: torch.device) -> MaskSAMOutput:
    """All that the network computes for one window (C, D, H, W), or (C, H, W), in float32 on the CPU."""
    with autocast(device):
        parts = network.parts(window[None].to(device))
    return MaskSAMOutput(*(part.float().cpu() for part in parts))


@torch.inference_mode()
def owners(parts: MaskSAMOutput, regions: bool) -> NDArray[np.int64]:
    """(D, H, W): the number, from 1, of the query that adds most to the class that each voxel is given; 0: background.

    With regions the class is the last one, in their order, that the voxel belongs to, as in nnU-Net.
    """
    semantic = semantic_log_probabilities(parts.class_logits, parts.mask_logits, regions)[0]  # (K, D, H, W)
    if regions:
        order = torch.arange(1, len(semantic) + 1).view(-1, 1, 1, 1)
        winner = ((semantic > 0) * order).amax(0) - 1  # -1: in no region
        background = winner < 0
        winner = winner.clamp(min=0)
    else:
        winner = semantic.argmax(0)
        background = winner == 0
    classes = parts.class_logits[0].float().softmax(-1)  # (D, N, K + 1)
    result = torch.empty(winner.shape, dtype=torch.int64)
    for depth in range(len(winner)):  # a slice at a time: all queries' masks of a window are large
        of_winner = classes[depth][:, winner[depth]]  # (N, H, W)
        result[depth] = (of_winner * parts.mask_logits[0, depth].sigmoid()).argmax(0) + 1
    result[background] = 0
    return result.numpy()


def _corner(window: tuple[Any, ...]) -> Corner:
    first, second, third = (part if isinstance(part, int) else part.start for part in window[1:])
    return int(first), int(second), int(third)


def _read(
    network: MaskSAM,
    parts: MaskSAMOutput,
    depth: int,
    index: int,
    number: int,
    count: int,
    corner: Corner,
    size: Corner,
    volume: Sequence[int],
) -> SliceQueries:
    one = MaskSAMOutput(*(part[:, depth : depth + 1] for part in parts))
    prompts = read_prompts(one, network.grid.padded, size[1:], network.num_classes)
    rows, columns = (
        slice(max(-start, 0), min(length, whole - start))
        for start, length, whole in zip(corner[1:], size[1:], volume[1:], strict=True)
    )
    return SliceQueries(
        index=index,
        window=number + 1,
        windows=count,
        corner=corner,
        size=size,
        probabilities=prompts.probabilities[0],
        boxes=prompts.boxes[0],
        drafts=prompts.masks[0],
        masks=one.mask_logits[0, 0].sigmoid().numpy(),
        inside=(rows, columns),
    )
