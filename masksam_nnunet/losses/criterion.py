"""The training loss: mask classification on matched pairs, and nnU-Net's own loss on the semantic output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Grid, LossConfig
from ..modeling.compute import full_precision
from ..modeling.geometry import generalised_iou, to_patch
from ..modeling.network import MaskSAMOutput
from ..semantic import semantic_log_probabilities
from .masks import CPU_PIECE, GPU_PIECE, PairSums, draw, matched_mask_losses, pairwise_sums, uncertain_points
from .matching import Matches, match, pairwise_cost
from .targets import Targets, make_targets

SemanticLoss = Callable[[Tensor, Tensor], Tensor]

FEW_CLASSES = 32  # room for so many targets in every slice costs little


class MaskSAMCriterion(nn.Module):
    """Weighted sum of all terms.

    Args:
        loss: weights and sampling.
        grid: sizes of the network.
        num_classes: K.
        regions: whether the classes are overlapping regions.
        ignore_label: label without truth, if the dataset has one.
        semantic_loss: nnU-Net's loss of (log-probabilities (B, K, D, H, W), segmentation); needed if its weight is
            not 0.
    """

    def __init__(
        self,
        loss: LossConfig,
        grid: Grid,
        num_classes: int,
        regions: bool = False,
        ignore_label: int | None = None,
        semantic_loss: SemanticLoss | None = None,
    ) -> None:
        super().__init__()
        if loss.semantic and semantic_loss is None:
            raise ValueError(f"loss.semantic = {loss.semantic} needs a semantic_loss; pass one or set the weight to 0")
        self.loss = loss
        self.grid = grid
        self.num_classes = num_classes
        self.regions = regions
        self.ignore_label = ignore_label
        self.semantic_loss = semantic_loss
        self.piece: int | None = None
        """Elements of masks that are worked on at once; None: as the device suggests."""

    def forward(self, output: MaskSAMOutput, segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each of its terms before weighting, detached.

        Args:
            output: of the network.
            segmentation: as nnU-Net's data loader gives it, see :func:`make_targets`.
        """
        with torch.autocast(segmentation.device.type, enabled=False):
            terms = self._mask_classification(output, segmentation)
            if self.loss.semantic and self.semantic_loss is not None:
                semantic = semantic_log_probabilities(output.class_logits, output.mask_logits, self.regions)
                if segmentation.ndim == 4:  # a 2D patch
                    semantic = semantic[:, :, 0]
                terms["semantic"] = self.semantic_loss(semantic, segmentation)
        weights = {name: getattr(self.loss, "class_weight" if name == "class" else name) for name in terms}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def find_targets(self, segmentation: Tensor, on_host: bool | None = None) -> Targets:
        """The targets of a batch, see :func:`make_targets`; ``on_host``: whether its device is the CPU."""
        on_host = segmentation.device.type == "cpu" if on_host is None else on_host
        # An accelerator would be waited for to learn how many targets a slice holds: it makes room for all instead.
        most = self.num_classes if self.num_classes <= FEW_CLASSES and not on_host else None
        return make_targets(segmentation, self.num_classes, self.grid.padded, self.regions, self.ignore_label, most)

    def assign(self, cost: Tensor, targets: Targets) -> Matches:
        """The matched pairs, see :func:`match`."""
        return match(cost, targets, self.grid.patch[0], self.loss.matching)

    def _mask_classification(self, output: MaskSAMOutput, segmentation: Tensor) -> dict[str, Tensor]:
        targets = self.find_targets(segmentation)
        classes, boxes = (full_precision(x).flatten(0, 1) for x in (output.class_logits, output.aux_boxes))
        masks = output.mask_logits.flatten(3)  # (B, D, N, V), V = H W
        aux_masks = output.aux_mask_logits
        if self.grid.masks != self.grid.padded:  # the gradient of resizing adds up many numbers
            aux_masks = full_precision(aux_masks)
        aux_masks = to_patch(aux_masks, self.grid).flatten(3)
        truth = targets.masks.flatten(2)  # (S, T, V)
        valid = None if targets.valid is None else targets.valid.flatten(1)  # (S, V)

        size, number = masks.shape[-1], self.loss.num_points
        piece = self.piece or (CPU_PIECE if masks.device.type == "cpu" else GPU_PIECE)
        points = draw(len(classes), size, number, valid, masks.device) if size > number else None  # (S, P)
        sums = pairwise_sums([masks, aux_masks], truth, valid, points, piece)  # (S, N, T)
        matches = self.assign(pairwise_cost(classes, boxes, sums[0], sums[1], targets, self.loss), targets)
        total = _mean_over_ranks(targets.present.sum().float()).clamp(min=1)
        s, q, t = matches.slices, matches.queries, matches.targets
        terms = {"class": self._class_loss(classes, targets, matches)}
        for name, logits, of_all in (("mask", masks, sums[0]), ("aux", aux_masks, sums[1])):
            uncertain = self._uncertain_points(logits, (s, q), valid)  # (M, P)
            # All voxels have been compared already, or these have not.
            of_pairs = PairSums(*(x[s, q, t] for x in of_all)) if uncertain is None else None
            bce, dice = matched_mask_losses(logits, truth, valid, (s, q, t), uncertain, of_pairs, piece)
            terms[f"{name}_bce"], terms[f"{name}_dice"] = bce / total, dice / total
        wanted, found = targets.boxes[s, t], boxes[s, q]
        terms["box_l1"] = (found - wanted).abs().sum() / total
        terms["box_giou"] = (1 - generalised_iou(found, wanted)).sum() / total
        return terms

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)  # (S, N): "no object"
        wanted[matches.slices, matches.queries] = targets.classes[matches.slices, matches.targets]
        weight = torch.where(wanted == self.num_classes, self.loss.no_object, 1.0)
        if targets.valid is not None:
            weight = weight * targets.valid.flatten(1).any(1)[:, None]  # not slices that are wholly ignored
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return (losses * weight).sum() / _mean_over_ranks(weight.sum()).clamp(min=1e-6)

    def _uncertain_points(self, logits: Tensor, pairs: tuple[Tensor, Tensor], valid: Tensor | None) -> Tensor | None:
        """Voxels (M, P) at which matched masks are compared; None for all."""
        loss = self.loss
        if logits.shape[-1] <= loss.num_points:
            return None
        known = None if valid is None else valid[pairs[0]]
        return uncertain_points(logits, pairs, known, loss.num_points, loss.oversample, loss.uncertain_fraction)


def _mean_over_ranks(count: Tensor) -> Tensor:
    """DDP averages gradients over ranks, so sums are divided by the mean count to be normalised by the whole."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count
