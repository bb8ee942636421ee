"""Run a trained network on windows of a case and read what its queries do: prompts, masks, classes."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.compute import autocast
from masksam_nnunet.modeling.network import MaskSAMOutput
from masksam_nnunet.semantic import semantic_log_probabilities

from ..models import TrainedModel
from ..predictor import MaskSAMPredictor
from ..report.figures import InsideView

Corner = tuple[int, int, int]


@dataclass(frozen=True)
class SliceQueries:
    """What each of the N queries of one slice of one window finds.

    Attributes:
        index: the slice on the network's grid.
        window: its number, from 1, and the number of windows.
        corner: (d, h, w) of the window's first voxel on the network's grid; negative where the volume is padded.
        size: (D, H, W) of the window.
        probabilities: (N, K + 1), of each class, "no object" last.
        boxes: (N, 4), auxiliary boxes x0 y0 x1 y1 in pixels of the window.
        drafts: (N, H, W), auxiliary masks as probabilities.
        masks: (N, H, W), final masks as probabilities.
        inside: rows and columns of the window that lie in the volume.
    """

    index: int
    window: tuple[int, int]
    corner: Corner
    size: Corner
    probabilities: NDArray[np.float32]
    boxes: NDArray[np.float32]
    drafts: NDArray[np.float32]
    masks: NDArray[np.float32]
    inside: tuple[slice, slice]

    @property
    def plane(self) -> tuple[slice, slice]:
        """Rows and columns of the network's grid that ``inside`` covers."""
        rows, columns = (
            slice(part.start + start, part.stop + start)
            for part, start in zip(self.inside, self.corner[1:], strict=True)
        )
        return rows, columns


def look_inside(model: Path, fold: int, preprocessed: Path, case: str) -> InsideView:
    """Run a trained MaskSAM, on the CPU, on the patch around a case's labelled structures.

    Args:
        model: the model's folder in nnUNet_results.
        fold: the trained fold.
        preprocessed: the dataset's folder in nnUNet_preprocessed.
        case: a preprocessed case.
    """
    predictor = load_predictor(TrainedModel(model, (fold,)), torch.device("cpu"))
    network = cast(MaskSAM, predictor.hold_fold(0))
    settings = predictor.configuration_manager
    folder = str(preprocessed / settings.data_identifier)
    data, label, _, _ = infer_dataset_class(folder)(folder, [case]).load_case(case)
    volume = np.concatenate([np.asarray(data[:], np.float32), np.asarray(label[:], np.float32)])
    volume = pad_nd_image(volume, window_size(predictor), "constant", {"constant_values": 0})
    patch = volume[:, *patch_around(volume[-1] > 0, window_size(predictor))]  # (C + 1, D, H, W)
    outputs = run_network(network, torch.from_numpy(patch[:-1]), torch.device("cpu"))
    probabilities, boxes, masks = read_prompts(outputs, network.grid.padded, patch.shape[2:])
    heads, no_object = probabilities[..., :-1], probabilities[..., -1]
    return InsideView(
        case=case,
        image=patch[0],
        truth=patch[-1].astype(np.int16),
        aspect=float(settings.spacing[-2] / settings.spacing[-1]),
        classes=heads.argmax(-1),
        confidence=heads.max(-1),
        kept=heads.max(-1) > no_object,
        boxes=boxes,
        masks=masks,
    )


def load_predictor(model: TrainedModel, device: torch.device, mirroring: bool = True) -> MaskSAMPredictor:
    """Load a trained model without nnU-Net's printed remarks and warnings."""
    os.environ[EXT_TRAINER] = ext_trainer_value(os.environ.get(EXT_TRAINER))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = MaskSAMPredictor(
            device=device, use_mirroring=mirroring, perform_everything_on_device=device.type == "cuda", allow_tqdm=False
        )
        model.load(predictor)
    return predictor


def look_into_windows(
    predictor: MaskSAMPredictor,
    data: Tensor,
    places: Mapping[int, NDArray[np.bool_]],
    spacing: Sequence[float],
) -> tuple[dict[int, SliceQueries], NDArray[np.integer[Any]]]:
    """Run the first fold once, unmirrored, on each of nnU-Net's windows.

    Args:
        predictor: with the model.
        data: (C, D, H, W).
        places: for each wanted slice, the pixels (H, W) that its window should be near to; the whole slice if none.
        spacing: millimetres along (D, H, W).

    Returns:
        The queries of each wanted slice; and for each voxel (D, H, W) the number, from 1, of the query that adds most
        to its class in the window whose centre is nearest, or 0 for background.
    """
    network = cast(MaskSAM, predictor.hold_fold(0)).to(predictor.device).eval()
    size = window_size(predictor)
    padded, back = pad_nd_image(data, size, "constant", {"value": 0}, True)
    offset = [int(part.start or 0) for part in back[1:]]
    windows = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
    corners = [tuple(w if isinstance(w, int) else w.start for w in window[1:]) for window in windows]
    chosen: dict[int, list[int]] = {}
    for index, found in places.items():
        centre = np.argwhere(found if found.any() else np.ones_like(found)).mean(axis=0)
        place = np.array([index, *centre]) + offset
        chosen.setdefault(nearest_window(corners, size, place.tolist(), spacing), []).append(index)

    owner = np.zeros(padded.shape[1:], np.uint8 if network.config.num_queries < 256 else np.uint16)
    nearness = np.full(padded.shape[1:], -1.0, np.float32)
    patch = tuple(predictor.configuration_manager.patch_size)
    gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    weight = gaussian.float().numpy().reshape(size)
    slices = {}
    for number, corner in enumerate(corners):
        where = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        parts = run_network(network, padded[:, *where], predictor.device)
        nearer = weight > nearness[where]
        nearness[where][nearer] = weight[nearer]
        owner[where][nearer] = owners(parts, network.config.regions)[nearer]
        d, h, w = (start - by for start, by in zip(corner, offset, strict=True))
        rows, columns = (
            slice(max(-start, 0), min(length, whole - start))
            for start, length, whole in zip((h, w), size[1:], data.shape[2:], strict=True)
        )
        for index in chosen.get(number, ()):
            one = MaskSAMOutput(*(part[:, index - d : index - d + 1] for part in parts))
            probabilities, boxes, drafts = read_prompts(one, network.grid.padded, size[1:])
            slices[index] = SliceQueries(
                index=index,
                window=(number + 1, len(corners)),
                corner=(d, h, w),
                size=size,
                probabilities=probabilities[0],
                boxes=boxes[0],
                drafts=drafts[0],
                masks=one.mask_logits[0, 0].sigmoid().numpy(),
                inside=(rows, columns),
            )
    return slices, owner[back[1:]]


def window_size(predictor: MaskSAMPredictor) -> Corner:
    """(D, H, W) of nnU-Net's windows; D is 1 for a 2D configuration."""
    depth, height, width = ([1, 1, *map(int, predictor.configuration_manager.patch_size)])[-3:]
    return depth, height, width


def patch_around(foreground: NDArray[np.bool_], size: Sequence[int]) -> tuple[slice, ...]:
    """The patch of ``size`` around the foreground's centre of mass, kept inside the volume, which is not smaller."""
    places = np.argwhere(foreground if foreground.any() else np.ones_like(foreground))
    starts = np.rint(places.mean(axis=0) - (np.array(size) - 1) / 2).astype(int)
    starts = starts.clip(0, np.array(foreground.shape) - size)
    return tuple(slice(start, start + length) for start, length in zip(starts, size, strict=True))


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
        parts = network.parts((window[:, 0] if flat else window)[None].to(device))
    return MaskSAMOutput(*(part.float().cpu() for part in parts))


def read_prompts(
    parts: MaskSAMOutput, padded: Sequence[int], plane: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Bring the outputs for a window of D slices to its (H, W) pixels.

    Args:
        parts: class_logits (1, D, N, K + 1), aux_mask_logits (1, D, N, h, w), aux_boxes (1, D, N, 4) in [0, 1].
        padded: (H_p, W_p) of the padded plane, in whose upper left corner the window lies.
        plane: (H, W).

    Returns:
        Class probabilities (D, N, K + 1), "no object" last; boxes (D, N, 4) as x0 y0 x1 y1 in pixels, which may leave
        the window; auxiliary masks (D, N, H, W) as probabilities.
    """
    height, width = padded
    logits = interpolate(parts.aux_mask_logits[0], size=(height, width), mode="bilinear")
    boxes = parts.aux_boxes[0] * torch.tensor([width, height, width, height])
    masks = logits[..., : plane[0], : plane[1]].sigmoid()
    return parts.class_logits[0].softmax(-1).numpy(), boxes.numpy(), masks.numpy()


@torch.inference_mode()
def owners(parts: MaskSAMOutput, regions: bool) -> NDArray[np.int64]:
    """(D, H, W): the number, from 1, of the query that adds most to each voxel's class; 0 for background.

    Of several regions the last one counts, as in nnU-Net.
    """
    scores = semantic_log_probabilities(parts.class_logits, parts.mask_logits, regions)[0]  # (K, D, H, W)
    classes = parts.class_logits[0].softmax(-1)  # (D, N, K + 1)
    if regions:  # a background before them wins where no region does
        order = torch.arange(1, len(scores) + 1).view(-1, 1, 1, 1)
        scores = torch.cat([torch.zeros_like(scores[:1]), (scores > 0) * order])
        classes = pad(classes, (1, 0))
    winner = scores.argmax(0)
    masks = parts.mask_logits[0]
    # A slice at a time: all queries' masks of a window are large.
    slices = [(classes[d][:, winner[d]] * masks[d].sigmoid()).argmax(0) + 1 for d in range(len(winner))]
    return torch.where(winner == 0, 0, torch.stack(slices)).numpy()
