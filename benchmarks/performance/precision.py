"""bfloat16 and float16 against float32: losses and gradients of a step, or what a trained model predicts.

    python benchmarks/performance/precision.py [--device cuda] [--model FOLDER] [--cases N]

FOLDER is a trained model of nnU-Net (TRAINER__PLANS__CONFIGURATION in nnUNet_results): fold 0 predicts validation
cases, whose preprocessed images are in nnUNet_preprocessed, without mirroring. float32 is without TF32. On a GPU the
rows go to results.json and the page of bench.py; a CPU takes steps of the first network only, since float16 is slow.
The exit status is 1 where a gradient or a prediction in float16 is further from float32's than :data:`LEAST` allows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import RESULTS, device_name, save, show
from cases import blobs
from measure import result
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from performance_page import write_page
from torch import Tensor

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import dice_and_cross_entropy
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value
from masksam_nnunet.files import read_json
from masksam_nnunet.inference.predictor import MaskSAMPredictor
from masksam_nnunet.losses.criterion import MaskSAMCriterion
from masksam_nnunet.modeling import MaskSAM

NETWORKS = {
    "tiny": MaskSAMConfig("tiny", (4, 64, 64), 1),
    "LiteMedSAM": MaskSAMConfig("lite_medsam", (4, 96, 96), 1),
    "LiteMedSAM, the paper's form": MaskSAMConfig("lite_medsam", (4, 96, 96), 1, 8, "slice"),
    "ViT-B": MaskSAMConfig("vit_b", (2, 64, 64), 4),
}
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST = {"gradients of a step, cosine": 0.98, "Dice of a prediction with float32's, mean": 0.999}
"""Bounds of rows whose names begin so; of predictions, those in float16, which is what predictions run in."""
SCALE = 2.0**14
"""Of a float16 step's loss, so that small gradients are no zeros; that of a training starts at 2^16."""


def step_rows(name: str, config: MaskSAMConfig, device: torch.device) -> list[dict[str, Any]]:
    """A step with random weights, nothing of which is zero."""
    torch.manual_seed(0)
    network = MaskSAM(config, 1, 4).train()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    data, truth = torch.randn(2, 1, *config.patch_size), blobs(2, config.patch_size[0], config.patch_size[1], 4)
    network, data, truth = network.to(device), data.to(device), truth.to(device)
    judge = MaskSAMCriterion(config, 4, semantic_loss=dice_and_cross_entropy)

    def step(dtype: torch.dtype | None, scale: float = 1.0) -> tuple[float, Tensor]:
        network.zero_grad()
        torch.manual_seed(1)  # of the points at which masks are compared
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = network(data)
        loss = judge(output, truth)[0]
        (scale * loss).backward()
        gradients = torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])
        return loss.item(), gradients / scale

    exact, wanted = step(None)
    rows, more = [], {"device": device_name(device.type), "shapes": f"{name}, random weights", "repeats": 1}
    for variant, dtype in FORMATS.items():
        scale = SCALE if dtype == torch.float16 else 1.0
        loss, found = step(dtype, scale)
        while scale > 1 and not found.isfinite().all():  # as the scaler of a training
            scale /= 2
            loss, found = step(dtype, scale)
        same = torch.cosine_similarity(wanted, found, dim=0).item()
        rows.append(result("loss of a step", variant, "float32", loss, exact, "", **more))
        rows.append(result("gradients of a step, cosine", variant, "float32", same, 1.0, "", **more))
        lengths = found.norm().item(), wanted.norm().item()
        rows.append(result("gradients of a step, length", variant, "float32", *lengths, "", **more))
    return [row | {"name": f"{row['name']}: {name}"} for row in rows]


def prediction_rows(model: Path, number: int | None, device: torch.device) -> list[dict[str, Any]]:
    """Mean and least Dice, over cases and classes, of what is predicted in a format with what float32 predicts."""
    os.environ.setdefault(EXT_TRAINER, ext_trainer_value(None))
    on_gpu = device.type == "cuda"
    predictor = MaskSAMPredictor(
        use_mirroring=False, perform_everything_on_device=on_gpu, device=device, allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    folder = Path(os.environ["nnUNet_preprocessed"]) / model.parent.name
    names = read_json(folder / "splits_final.json")[0]["val"][:number]
    images = folder / predictor.configuration_manager.data_identifier
    dataset = infer_dataset_class(str(images))(str(images), names)
    forward = predictor.network.forward

    def segment(data: Tensor, dtype: torch.dtype | None) -> Tensor:
        def in_format(x: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return forward(x)

        predictor.network.forward = in_format
        return predictor.predict_logits_from_preprocessed_data(data).argmax(0)

    found: dict[str, list[float]] = {name: [] for name in (*FORMATS, "float32")}
    truths: dict[str, list[float]] = {name: [] for name in found}
    for name in names:
        data, truth, *_ = dataset.load_case(name)
        data, truth = torch.from_numpy(np.array(data)), torch.from_numpy(np.array(truth))[0]
        exact = segment(data, None)
        for variant in found:
            segmentation = exact if variant == "float32" else segment(data, FORMATS[variant])
            labels = range(1, predictor.label_manager.num_segmentation_heads)
            found[variant] += [_dice(segmentation == label, exact == label) for label in labels]
            truths[variant] += [_dice(segmentation == label, truth == label) for label in labels]
    shapes = f"{model.name.split('__')[0]}, {len(names)} cases of {model.parent.name}"
    more = {"device": device_name(device.type), "shapes": shapes, "repeats": 1}
    rows = []
    for variant in FORMATS:
        for what, reduce in (("mean", np.nanmean), ("least", np.nanmin)):
            title = f"Dice of a prediction with float32's, {what}"
            rows.append(result(title, variant, "float32", float(reduce(found[variant])), 1.0, "", **more))
        scores = (float(np.nanmean(truths[each])) for each in (variant, "float32"))
        rows.append(result("Dice of a prediction with the labels", variant, "float32", *scores, "", **more))
    return rows


def _dice(a: Tensor, b: Tensor) -> float:
    total = (a.sum() + b.sum()).item()
    return 2 * (a & b).sum().item() / total if total else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cases", type=int)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    tell: Callable[[list[dict[str, Any]]], None] = save if device.type == "cuda" else show
    rows = []
    chosen = list(NETWORKS.items())[: 1 if device.type == "cpu" else None]
    steps = (step_rows(name, config, device) for name, config in chosen)
    for found in [prediction_rows(arguments.model, arguments.cases, device)] if arguments.model else steps:
        tell(found)
        rows += found
    if device.type == "cuda":
        write_page(json.loads(RESULTS.read_text()))
    far = [f"{row['name']}, {row['variant']}: {row['ours']}" for row in rows if is_far(row)]
    if far:
        raise SystemExit("too far from float32: " + "; ".join(far))


def is_far(row: dict[str, Any]) -> bool:
    """Whether a row misses its bound; NaN does."""
    least = next((bound for name, bound in LEAST.items() if row["name"].startswith(name)), None)
    if least is None or (row["name"].startswith("Dice") and row["variant"] == "bfloat16"):
        return False
    return not row["ours"] >= least


if __name__ == "__main__":
    main()
