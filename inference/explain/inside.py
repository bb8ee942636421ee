"""MaskSAM's prompts on a validation case: the boxes and masks that it draws for itself."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray

from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value

from ..label_maps import Classes
from ..report.figures import InsideView
from .prompts import read_prompts


def look_inside(model: Path, fold: int, preprocessed: Path, case: str, classes: Classes) -> InsideView:
    """Run a trained MaskSAM on the patch around a case's labelled structures and return its prompts.

    Runs on the CPU: it is one patch.

    Args:
        model: the model's folder in nnUNet_results, the one that holds ``fold_F``.
        fold: the trained fold.
        preprocessed: the dataset's folder in nnUNet_preprocessed.
        case: a preprocessed case.
        classes: of the dataset.
    """
    predictor = _load(model, fold)
    configuration = predictor.configuration_manager
    patch_size = tuple(int(n) for n in configuration.patch_size)
    folder = str(preprocessed / configuration.data_identifier)
    data, seg, _, _ = infer_dataset_class(folder)(folder, [case]).load_case(case)
    image, truth = np.asarray(data[:], dtype=np.float32), np.asarray(seg[:])[0].astype(np.int16)

    flat = len(patch_size) == 2
    shape = (1, *patch_size) if flat else patch_size
    window = patch_window(truth > 0, shape)
    patch = torch.from_numpy(np.stack([cut(channel, window, shape) for channel in image]))[None]  # (1, C, D, H, W)
    network = predictor.network.to("cpu").float().eval()
    with torch.no_grad():
        parts = network.parts(patch[:, :, 0] if flat else patch)
    spacing = [float(s) for s in configuration.spacing]
    return read_parts(
        parts,
        network.grid.padded,
        case=case,
        image=patch[0, 0].numpy(),
        truth=cut(truth, window, shape),
        aspect=spacing[-2] / spacing[-1],
        num_heads=len(classes.heads),
    )


def read_parts(
    parts: Any,
    padded: Sequence[int],
    *,
    case: str,
    image: NDArray[np.float32],
    truth: NDArray[np.int16],
    aspect: float,
    num_heads: int,
) -> InsideView:
    """Turn a ``MaskSAMOutput`` of one volume into pixels of its patch.

    Args:
        parts: with the fields class_logits (1, D, N, K+1), aux_mask_logits (1, D, N, 4g_h, 4g_w) and aux_boxes
            (1, D, N, 4) in [0, 1] of the padded plane.
        padded: (H_p, W_p), size of that plane in pixels of the patch, which lies in its upper left corner.
        case: its name.
        image: (D, H, W).
        truth: (D, H, W).
        aspect: height of a pixel over its width.
        num_heads: K.

    Raises:
        ValueError: if the output has not K + 1 classes.
    """
    prompts = read_prompts(parts, padded, image.shape[-2:], num_heads)
    heads, no_object = prompts.probabilities[..., :-1], prompts.probabilities[..., -1]
    confidence = heads.max(-1)
    return InsideView(
        case=case,
        image=image,
        truth=truth,
        aspect=aspect,
        classes=heads.argmax(-1),
        confidence=confidence,
        kept=confidence > no_object,
        boxes=prompts.boxes,
        masks=prompts.masks,
    )


def patch_window(foreground: NDArray[np.bool_], shape: Sequence[int]) -> tuple[int, ...]:
    """First voxel of a patch around the foreground's centre of mass, kept inside the volume where it fits."""
    places = np.argwhere(foreground if foreground.any() else np.ones_like(foreground))
    centre = places.mean(axis=0)
    starts = np.rint(centre - (np.array(shape) - 1) / 2).astype(int)
    room = np.array(foreground.shape) - np.array(shape)
    # Too small a volume is centred, as nnU-Net's sliding window does it.
    return tuple(int(min(max(s, 0), r)) if r >= 0 else int(r // 2) for s, r in zip(starts, room, strict=True))


def cut(volume: NDArray[Any], window: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
    """The patch of ``shape`` that starts at ``window``, zeros where it leaves the volume."""
    before = [max(-start, 0) for start in window]
    after = [max(s + n - size, 0) for s, n, size in zip(window, shape, volume.shape, strict=True)]
    padded = np.pad(volume, list(zip(before, after, strict=True)))
    return padded[tuple(slice(s + b, s + b + n) for s, b, n in zip(window, before, shape, strict=True))]


def _load(model: Path, fold: int) -> nnUNetPredictor:
    """nnU-Net's own way to a trained network, without its remarks and warnings."""
    trainers = ext_trainer_value(os.environ.get(EXT_TRAINER))
    quiet = contextlib.redirect_stdout(io.StringIO())
    with _environment({EXT_TRAINER: trainers}), quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    return predictor


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
