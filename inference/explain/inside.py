"""Run a trained network on windows of a case and read what its queries do: prompts, masks, classes."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.compute import autocast
from masksam_nnunet.modeling.network import MaskSAMOutput
from masksam_nnunet.semantic import semantic_log_probabilities

from ..models import TrainedModel
from ..predictor import MaskSAMPredictor

Corner = tuple[int, int, int]


@dataclass(frozen=True)
class SliceQueries:
    """What each of the N queries of one slice of one window finds."""

    index: int  # the slice on the network's grid
    window: tuple[int, int]  # its number, from 1, and the number of windows
    corner: Corner  # (d, h, w) of the window's first voxel on the network's grid; negative where the volume is padded
    size: Corner  # (D, H, W) of the window
    probabilities: NDArray[np.float32]  # (N, K + 1), of each class, "no object" last
    boxes: NDArray[np.float32]  # (N, 4), auxiliary boxes x0 y0 x1 y1 in pixels of the window
    drafts: NDArray[np.float32]  # (N, H, W), auxiliary masks as probabilities
    masks: NDArray[np.float32]  # (N, H, W), final masks as probabilities
    inside: tuple[slice, slice]  # rows and columns of the window that lie in the volume

    @property
    def plane(self) -> tuple[slice, slice]:
        """Rows and columns of the network's grid that ``inside`` covers."""
        rows, columns = (
            slice(part.start + start, part.stop + start)
            for part, start in zip(self.inside, self.corner[1:], strict=True)
        )
        return rows, columns


def load_predictor(model: TrainedModel, device: torch.device, mirroring: bool = True) -> MaskSAMPredictor:
    """Load a trained model without nnU-Net's printed remarks and warnings."""
    os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = MaskSAMPredictor(
            device=device, use_mirroring=mirroring, perform_everything_on_device=device.type == "cuda"
        )
        model.load(predictor)
    return predictor


def look_into_windows(
    predictor: MaskSAMPredictor,
    data: Tensor,
    places: Mapping[int, NDArray[np.bool_]],
    spacing: Sequence[float],
    everywhere: bool = True,
) -> tuple[dict[int, SliceQueries], NDArray[np.integer[Any]]]:
    """Run the first fold once, unmirrored, on nnU-Net's windows.

    Args:
        predictor: with the model.
        data: (C, D, H, W).
        places: for each wanted slice, the pixels (H, W) that its window should be near to; the whole slice if none.
        spacing: millimetres along (D, H, W).
        everywhere: all windows, not only those of the wanted slices.

    Returns:
        The queries of each wanted slice; and for each voxel (D, H, W) the number, from 1, of the query that adds most
        to its class in the window whose centre is nearest, or 0 for background and outside the windows.
    """
    network = cast(MaskSAM, predictor.hold_fold(0)).to(predictor.device).eval()
    patch = tuple(predictor.configuration_manager.patch_size)
    depth, height, width = ([1, 1, *map(int, patch)])[-3:]  # 2D: one slice
    size = (depth, height, width)
    padded, back = pad_nd_image(data, size, "constant", {"value": 0}, True)
    offset = [int(part.start or 0) for part in back[1:]]
    windows = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
    corners = [tuple(w if isinstance(w, int) else w.start for w in window[1:]) for window in windows]
    chosen: dict[int, list[int]] = {}
    for index, found in places.items():
        centre = np.argwhere(found if found.any() else np.ones_like(found)).mean(axis=0)
        place = np.array([index, *centre]) + offset
        chosen.setdefault(nearest_window(corners, size, place.tolist(), spacing), []).append(index)

    owner = np.zeros(padded.shape[1:], np.uint8 if network.num_queries < 256 else np.uint16)
    nearness = np.full(padded.shape[1:], -1.0, np.float32)
    gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    weight = gaussian.float().numpy().reshape(size)
    slices = {}
    for number in range(len(corners)) if everywhere else sorted(chosen):
        where = tuple(slice(start, start + length) for start, length in zip(corners[number], size, strict=True))
        parts = run_network(network, padded[:, *where], predictor.device)
        nearer = weight > nearness[where]
        nearness[where][nearer] = weight[nearer]
        owner[where][nearer] = owners(parts, network.config)[nearer]
        d, h, w = (start - by for start, by in zip(corners[number], offset, strict=True))
        rows, columns = (
            slice(max(-start, 0), min(length, whole - start))
            for start, length, whole in zip((h, w), size[1:], data.shape[2:], strict=True)
        )
        for index in chosen.get(number, ()):
            one = parts.changed(itemgetter((slice(None), slice(index - d, index - d + 1))))
            probabilities, boxes, drafts = read_prompts(one, network.grid.padded, size[1:])
            slices[index] = SliceQueries(
                index=index,
                window=(number + 1, len(corners)),
                corner=(d, h, w),
                size=size,
                probabilities=probabilities,
                boxes=boxes,
                drafts=drafts,
                masks=one.mask_logits[0, 0].sigmoid().numpy(),
                inside=(rows, columns),
            )
    return slices, owner[back[1:]]


def nearest_window(
    corners: Sequence[Sequence[int]], size: Sequence[int], place: Sequence[float], spacing: Sequence[float]
) -> int:
    """Of the windows that hold the slice of ``place`` (d, h, w), the one whose centre is nearest to it in space."""
    centres = np.array(corners) + (np.array(size) - 1) / 2
    distances = (((centres - np.array(place)) * np.array(spacing)) ** 2).sum(1)
    holding = [n for n, corner in enumerate(corners) if corner[0] <= place[0] < corner[0] + size[0]]
    return min(holding, key=lambda number: float(distances[number]))


@torch.inference_mode()
def run_network(network: MaskSAM, window: Tensor, device: torch.device) -> MaskSAMOutput:
    """All outputs of the network for one window (C, D, H, W), in float32 on the CPU."""
    flat = len(network.config.patch_size) == 2
    with autocast(device):
        parts = network.outputs((window[:, 0] if flat else window)[None].to(device))
    return parts.changed(lambda part: part.float().cpu())


def read_prompts(
    parts: MaskSAMOutput, padded: Sequence[int], plane: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Bring the prompts of one slice to the (H, W) pixels of its window, in the corner of the ``padded`` plane.

    Returns:
        Class probabilities (N, K + 1), "no object" last; boxes (N, 4) as x0 y0 x1 y1 in pixels, which may leave the
        window; auxiliary masks (N, H, W) as probabilities.
    """
    height, width = padded
    logits = interpolate(parts.aux_mask_logits[0], size=(height, width), mode="bilinear")[0]
    boxes = parts.aux_boxes[0, 0] * torch.tensor([width, height, width, height])
    masks = logits[..., : plane[0], : plane[1]].sigmoid()
    return parts.class_logits[0, 0].softmax(-1).numpy(), boxes.numpy(), masks.numpy()


@torch.inference_mode()
def owners(parts: MaskSAMOutput, config: MaskSAMConfig) -> NDArray[np.int64]:
    """(D, H, W): the number, from 1, of the query that adds most to each voxel's class; 0 for background.

    Of several regions the last one counts, as in nnU-Net.
    """
    regions = config.regions
    scores = semantic_log_probabilities(parts.class_logits, parts.mask_logits, regions, config.anchored)[0]
    classes = parts.class_logits[0].softmax(-1)  # (D, N, K + 1)
    if regions:  # a background before them wins where no region does
        order = torch.arange(1, len(scores) + 1).view(-1, 1, 1, 1)
        scores = torch.cat([torch.zeros_like(scores[:1]), (scores > 0) * order])
        classes = pad(classes, (1, 0))
    winner = scores.argmax(0)  # of (K, D, H, W)
    masks = parts.mask_logits[0]
    # A slice at a time: all queries' masks of a window are large.
    slices = [(classes[d][:, winner[d]] * masks[d].sigmoid()).argmax(0) + 1 for d in range(len(winner))]
    return torch.where(winner == 0, 0, torch.stack(slices)).numpy()
