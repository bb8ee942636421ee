"""The training loss: mask classification on matched pairs, and nnU-Net's own loss on the semantic output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Grid, LossConfig
from .matching import Matches, Predictions, generalised_iou, match
from .modeling.network import MaskSAMOutput
from .modeling.resize import to_patch
from .semantic import semantic_log_probabilities
from .targets import Targets, make_targets

SemanticLoss = Callable[[Tensor, Tensor], Tensor]


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
        weights = {
            "class": self.loss.class_weight,
            "mask_bce": self.loss.mask_bce,
            "mask_dice": self.loss.mask_dice,
            "aux_bce": self.loss.aux_bce,
            "aux_dice": self.loss.aux_dice,
            "box_l1": self.loss.box_l1,
            "box_giou": self.loss.box_giou,
            "semantic": self.loss.semantic,
        }
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def find_targets(self, segmentation: Tensor) -> Targets:
        """The targets of a batch, see :func:`make_targets`."""
        return make_targets(segmentation, self.num_classes, self.grid.padded, self.regions, self.ignore_label)

    def assign(
        self, predictions: Predictions, targets: Targets, target_points: Tensor, valid_points: Tensor
    ) -> Matches:
        """The matched pairs, see :func:`match`."""
        return match(predictions, targets, target_points, valid_points, self.grid.patch[0], self.loss)

    def _mask_classification(self, output: MaskSAMOutput, segmentation: Tensor) -> dict[str, Tensor]:
        targets = self.find_targets(segmentation)
        classes, masks, aux_masks, boxes = (_full(x).flatten(0, 1) for x in output)  # (S, N, ...)
        aux_masks = to_patch(aux_masks, self.grid).flatten(2)  # (S, N, H W)
        masks = masks.flatten(2)
        flat, valid = targets.masks.flatten(2), targets.valid.flatten(1)  # (S, T, H W), (S, H W)

        points = self._uniform_points(valid)  # (S, P), or None for all
        matches = self.assign(
            Predictions(classes, _at(masks, points), _at(aux_masks, points), boxes),
            targets,
            _at(flat, points).to(masks.dtype),
            _at(valid, points).to(masks.dtype),
        )
        total = _mean_over_ranks(targets.present.sum().float()).clamp(min=1)
        s, q, t = matches.slices, matches.queries, matches.targets
        truth, known = flat[s, t], valid[s]  # (M, H W)
        terms = {"class": self._class_loss(classes, targets, matches)}
        for name, logits in (("mask", masks[s, q]), ("aux", aux_masks[s, q])):
            bce, dice = self._mask_losses(logits, truth, known)
            terms[f"{name}_bce"], terms[f"{name}_dice"] = bce / total, dice / total
        wanted, found = targets.boxes[s, t], boxes[s, q]
        terms["box_l1"] = (found - wanted).abs().sum() / total
        terms["box_giou"] = (1 - generalised_iou(found, wanted)).sum() / total
        return terms

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)  # (S, N): "no object"
        wanted[matches.slices, matches.queries] = targets.classes[matches.slices, matches.targets]
        weight = torch.where(wanted == self.num_classes, self.loss.no_object, 1.0)
        weight = weight * targets.valid.flatten(1).any(1)[:, None]  # of a slice wholly ignored nothing is known
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return (losses * weight).sum() / _mean_over_ranks(weight.sum()).clamp(min=1e-6)

    def _mask_losses(self, logits: Tensor, truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over pairs of BCE and of Dice; logits (M, H W) with truth and known voxels, both bool."""
        points = self._uncertain_points(logits, known)
        logits = _at(logits, points)
        target, weight = (_at(x, points).to(logits.dtype) for x in (truth, known))
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
        bce = (entropy.sum(-1) / weight.sum(-1).clamp(min=1)).sum()
        scores = logits.sigmoid() * weight
        overlap = 2 * (scores * target).sum(-1) + 1
        dice = (1 - overlap / (scores.sum(-1) + target.sum(-1) + 1)).sum()
        return bce, dice

    def _uniform_points(self, valid: Tensor) -> Tensor | None:
        """Voxels at which all queries of a slice are compared with all its targets: (S, P), or None for all."""
        if valid.shape[-1] <= self.loss.num_points:
            return None
        return self._draw(valid, self.loss.num_points)

    def _draw(self, known: Tensor, number: int) -> Tensor:
        """Voxels drawn uniformly, with replacement, from those known of each row (M, H W): (M, number)."""
        if self.ignore_label is None:
            return torch.randint(known.shape[1], (len(known), number), device=known.device)
        weight = torch.where(known.any(1, keepdim=True), known, True).float()  # a row of nothing known counts nowhere
        return weight.multinomial(number, replacement=True)

    @torch.no_grad()
    def _uncertain_points(self, logits: Tensor, known: Tensor) -> Tensor | None:
        """Importance sampling (PointRend, arXiv 1912.08193), at voxels: (M, P), or None for all."""
        points = self.loss.num_points
        if logits.shape[1] <= points:
            return None
        if not len(logits):  # no pair at all
            return torch.zeros(0, points, dtype=torch.long, device=logits.device)
        candidates = self._draw(known, int(points * self.loss.oversample))
        chosen = int(points * self.loss.uncertain_fraction)
        nearest = logits.gather(1, candidates).abs().topk(chosen, dim=1, largest=False, sorted=False).indices
        others = self._draw(known, points - chosen) if chosen < points else candidates[:, :0]
        return torch.cat([candidates.gather(1, nearest), others], dim=1)


def _at(x: Tensor, points: Tensor | None) -> Tensor:
    """Values of (S, ..., H W) at the points (S, P) of each slice."""
    if points is None:
        return x
    while points.ndim < x.ndim:
        points = points.unsqueeze(1)
    return x.gather(-1, points.expand(*x.shape[:-1], -1))


def _full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mean_over_ranks(count: Tensor) -> Tensor:
    """DDP averages gradients over ranks, so sums are divided by the mean count to be normalised by the whole."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count
