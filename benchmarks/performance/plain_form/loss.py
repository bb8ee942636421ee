"""Targets, matching and loss slice by slice, label by label (DETR, arXiv 2005.12872; Mask2Former, arXiv 2112.01527)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from masksam_nnunet.config import Grid, LossConfig
from masksam_nnunet.losses.matching import generalised_iou
from masksam_nnunet.modeling import MaskSAMOutput
from masksam_nnunet.modeling.geometry import to_patch


class PlainCriterion:
    """The mask classification loss for label maps without an ignore label, masks compared at every voxel.

    ``indexed``: every slice is taken from the batch by its index, as loops commonly do, where backward makes a gradient
    as large as the batch for each; else the batch is taken apart once.
    """

    def __init__(self, loss: LossConfig, grid: Grid, num_classes: int, indexed: bool = False) -> None:
        self.indexed = indexed
        self.loss = loss
        self.grid = grid
        self.num_classes = num_classes

    def __call__(self, output: MaskSAMOutput, segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms; ``segmentation`` is (B, 1, D, H, W)."""
        weights = self.loss
        aux_masks = to_patch(output.aux_mask_logits, self.grid)
        sums = {name: output.class_logits.new_zeros(()) for name in ("class", "bce", "dice", "aux_bce", "aux_dice")}
        sums |= {name: output.class_logits.new_zeros(()) for name in ("l1", "giou")}
        number, weight = 0, 0.0
        # Indexing a whole batch slice by slice would make a gradient as large as the batch for every slice.
        volumes = zip(
            output.class_logits, output.mask_logits, aux_masks, output.aux_boxes, segmentation[:, 0], strict=True
        )
        for volume in volumes:
            for logits, masks, aux, found, segmented in zip(*volume, strict=True):
                labels, truth, boxes = self._targets(segmented)
                queries, targets = self._match(logits, masks, aux, found, labels, truth, boxes)
                number += len(labels)

                wanted = torch.full((len(logits),), self.num_classes, device=logits.device)
                wanted[queries] = labels[targets]
                classes = torch.ones(self.num_classes + 1, device=logits.device)
                classes[-1] = weights.no_object
                sums["class"] = sums["class"] + F.cross_entropy(logits, wanted, classes, reduction="sum")
                weight += classes[wanted].sum().item()
                for prefix, predicted in (("", masks), ("aux_", aux)):
                    bce, dice = _pairs(predicted[queries].flatten(1), truth[targets].flatten(1))
                    sums[f"{prefix}bce"], sums[f"{prefix}dice"] = (
                        sums[f"{prefix}bce"] + bce,
                        sums[f"{prefix}dice"] + dice,
                    )
                sums["l1"] = sums["l1"] + (found[queries] - boxes[targets]).abs().sum()
                sums["giou"] = sums["giou"] + (1 - generalised_iou(found[queries], boxes[targets])).sum()
        terms = {
            "class": sums["class"] / weight,
            "mask_bce": sums["bce"] / number,
            "mask_dice": sums["dice"] / number,
            "aux_bce": sums["aux_bce"] / number,
            "aux_dice": sums["aux_dice"] / number,
            "box_l1": sums["l1"] / number,
            "box_giou": sums["giou"] / number,
        }
        factor = {"class": weights.class_weight} | {name: getattr(weights, name) for name in terms if name != "class"}
        return torch.stack([factor[name] * term for name, term in terms.items()]).sum(), terms

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes (T,), masks (T, H, W) and boxes (T, 4) of one slice."""
        rows, columns = self.grid.padded
        classes, masks, boxes = [], [], []
        for label in labels.unique().tolist():
            mask = labels == label
            y, x = mask.nonzero(as_tuple=True)
            classes.append(int(label))
            masks.append(mask.float())
            boxes.append(
                [
                    x.min().item() / columns,
                    y.min().item() / rows,
                    (x.max().item() + 1) / columns,
                    (y.max().item() + 1) / rows,
                ]
            )
        device = labels.device
        return torch.tensor(classes, device=device), torch.stack(masks), torch.tensor(boxes, device=device)

    @torch.no_grad()
    def _match(
        self,
        logits: Tensor,
        masks: Tensor,
        aux: Tensor,
        found: Tensor,
        labels: Tensor,
        truth: Tensor,
        boxes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = self.loss
        cost = -weights.class_weight * logits.softmax(-1)[:, labels]  # (N, T)
        truth = truth.flatten(1)  # (T, H W)
        for predicted, bce, dice in (
            (masks, weights.mask_bce, weights.mask_dice),
            (aux, weights.aux_bce, weights.aux_dice),
        ):
            flat = predicted.flatten(1)  # (N, H W)
            positive = F.binary_cross_entropy_with_logits(flat, torch.ones_like(flat), reduction="none")
            negative = F.binary_cross_entropy_with_logits(flat, torch.zeros_like(flat), reduction="none")
            cost = cost + bce * (positive @ truth.T + negative @ (1 - truth).T) / flat.shape[1]
            scores = flat.sigmoid()
            total = scores.sum(-1)[:, None] + truth.sum(-1)[None]
            cost = cost + dice * (1 - (2 * scores @ truth.T + 1) / (total + 1))
        cost = cost + weights.box_l1 * torch.cdist(found, boxes, p=1)
        cost = cost + weights.box_giou * (1 - generalised_iou(found[:, None], boxes[None]))
        queries, targets = linear_sum_assignment(cost.cpu())
        return torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device)


def _pairs(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum()
    scores = logits.sigmoid()
    dice = 1 - (2 * (scores * truth).sum(-1) + 1) / (scores.sum(-1) + truth.sum(-1) + 1)
    return bce, dice.sum()
