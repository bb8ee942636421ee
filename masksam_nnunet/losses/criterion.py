"""The training loss: mask classification on matched pairs, and nnU-Net's own loss on the semantic output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from ..method import find_method
from ..modeling.compute import full_precision
from ..modeling.geometry import generalised_iou, to_patch
from ..modeling.network import MaskSAMOutput
from ..semantic import semantic_log_probabilities
from .masks import CPU_PIECE, GPU_PIECE, PairSums, draw, matched_mask_losses, pairwise_sums, uncertain_points
from .matching import Matches, box_distance, match, pairwise_cost
from .targets import Targets, make_targets

SemanticLoss = Callable[[Tensor, Tensor], Tensor]

DECODER_DICE = "decoder_dice"
"""By how much the Dice of the batch differs from that of the generator's own maps."""
FEW_CLASSES = 32  # room for so many targets in every slice costs little


def supervised(
    loss: SemanticLoss, maps: Sequence[Tensor], segmentation: Tensor, weights: Sequence[float] = ()
) -> Tensor:
    """nnU-Net's loss of maps (B, K, d, h, w) of the patch or of strides of it.

    ``weights`` of each; if none are given they are halved from one to the next, as nnU-Net does.
    """
    weights = weights or [0.5**index for index in range(len(maps))]
    total = segmentation.new_zeros((), dtype=torch.float32)
    for logits, weight in zip(maps, weights, strict=True):
        if not weight:
            continue
        size = logits.shape[2:]
        if segmentation.ndim == 4:  # a 2D patch
            logits, size = logits[:, :, 0], size[1:]
        truth = segmentation
        if segmentation.shape[2:] != size:
            truth = F.interpolate(segmentation.float(), size=size, mode="nearest-exact").to(segmentation.dtype)
        total = total + weight * loss(full_precision(logits), truth)
    return total / sum(weights)


class SemanticCriterion(nn.Module):
    """nnU-Net's loss on the maps of the methods that predict classes directly.

    Args:
        config: of the network.
        semantic_loss: nnU-Net's loss of (logits (B, K, ...), segmentation).
    """

    def __init__(self, config: MaskSAMConfig, semantic_loss: SemanticLoss) -> None:
        super().__init__()
        self.weights = find_method(config.method).weights
        self.semantic_loss = semantic_loss
        self.progress = 0.0
        """Share of the training that is done."""

    def forward(self, output: Sequence[Tensor], segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it consists of, as :meth:`MaskSAMCriterion.forward`."""
        with torch.autocast(segmentation.device.type, enabled=False):
            weights = self.weights(self.progress) if self.weights is not None else ()
            loss = supervised(self.semantic_loss, output, segmentation, weights)
        return loss, {"semantic": loss.detach()}


class MaskSAMCriterion(nn.Module):
    """Weighted sum of all terms.

    Args:
        config: of the network, with weights and sampling.
        num_classes: K.
        ignore_label: label without truth, if the dataset has one.
        semantic_loss: nnU-Net's loss of (log-probabilities (B, K, D, H, W), segmentation); needed if its weight is
            not 0.
    """

    def __init__(
        self,
        config: MaskSAMConfig,
        num_classes: int,
        ignore_label: int | None = None,
        semantic_loss: SemanticLoss | None = None,
    ) -> None:
        super().__init__()
        loss = config.loss
        if loss.semantic and semantic_loss is None:
            raise ValueError(f"loss.semantic = {loss.semantic} needs a semantic_loss; pass one or set the weight to 0")
        self.config, self.loss = config, loss
        self.grid = Grid.of(config)
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.semantic_loss = semantic_loss
        self.piece: int | None = None
        """Elements of masks that are worked on at once; None: as the device suggests."""

    def forward(self, output: MaskSAMOutput, segmentation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each of its terms before weighting, detached; and :data:`DECODER_DICE`, which is no loss.

        Args:
            output: of the network.
            segmentation: as nnU-Net's data loader gives it, see :func:`make_targets`.
        """
        with torch.autocast(segmentation.device.type, enabled=False):
            terms = self._mask_classification(output, segmentation)
            if self.loss.semantic and self.semantic_loss is not None:
                config = self.config
                semantic = semantic_log_probabilities(
                    output.class_logits, output.mask_logits, config.regions, config.anchored
                )
                if segmentation.ndim == 4:  # a 2D patch
                    semantic = semantic[:, :, 0]
                terms["semantic"] = self.semantic_loss(semantic, segmentation)
            if self.loss.generator and self.semantic_loss is not None and output.class_maps:
                terms["generator"] = supervised(self.semantic_loss, output.class_maps, segmentation)
        weights = {name: getattr(self.loss, "class_weight" if name == "class" else name) for name in terms}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        found = {name: term.detach() for name, term in terms.items()}
        if "semantic" in terms and output.class_maps:
            dice = [self._foreground_dice(x.detach(), segmentation) for x in (semantic, output.class_maps[0])]
            found[DECODER_DICE] = dice[0] - dice[1]
        return total, found

    def _foreground_dice(self, logits: Tensor, segmentation: Tensor) -> Tensor:
        """Mean Dice over the foreground classes that the batch holds, or that are found in it."""
        number, ignored = self.num_classes, self.ignore_label
        logits = logits.reshape(len(logits), number, -1)  # (B, K, V)
        truth = segmentation.reshape(len(segmentation), segmentation.shape[1], -1)
        if self.config.regions:
            valid = truth[:, number:] == 0 if ignored is not None else torch.ones_like(truth[:, :1], dtype=torch.bool)
            found, wanted = (logits > 0) & valid, (truth[:, :number] > 0) & valid
            common, total = (found & wanted).sum((0, 2)), (found.sum((0, 2)) + wanted.sum((0, 2)))
        else:
            labels = truth[:, 0].long()
            pairs = logits.argmax(1) * number + labels
            if ignored is not None:
                pairs = pairs.masked_fill(labels == ignored, number**2)
            table = pairs.new_zeros(number**2 + 1).scatter_add_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
            table = table[:-1].view(number, number)
            common, total = table.diagonal()[1:], (table.sum(0) + table.sum(1))[1:]
        return (2 * common / total.clamp(min=1)).sum() / (total > 0).sum().clamp(min=1)

    def find_targets(self, segmentation: Tensor) -> Targets:
        """The targets of a batch, see :func:`make_targets`."""
        # An accelerator would be waited for to learn how many targets a slice holds: it makes room for all instead.
        most = self.num_classes if self.num_classes <= FEW_CLASSES and segmentation.device.type != "cpu" else None
        parts = self.config.num_queries if self.config.anchored else 1
        regions = self.config.regions
        return make_targets(segmentation, self.num_classes, self.grid.padded, regions, self.ignore_label, most, parts)

    def assign(self, cost: Tensor | None, targets: Targets) -> Matches:
        """The matched pairs, see :func:`match`; ``cost`` is None where each class has one query."""
        if cost is None:
            return Matches.of_classes(targets)
        return match(cost, targets, self.grid.patch[0], self.config.matching)

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
        sums: list[PairSums] | None = None
        if self.config.anchored and self.config.num_queries == 1:
            matches = self.assign(None, targets)
        else:
            points = None
            if size > number:
                points = draw(len(classes), size, number, valid, masks.device, truth)  # (S, P)
            sums = pairwise_sums([masks, aux_masks], truth, valid, points, piece)  # (S, N, T)
            matches = self.assign(pairwise_cost(classes, boxes, sums[0], sums[1], targets, self.loss), targets)
        total = _mean_over_ranks(targets.present.sum().float()).clamp(min=1)
        s, q, t = matches.slices, matches.queries, matches.targets
        terms = {"class": self._class_loss(classes, targets, matches)}
        for index, (name, logits) in enumerate((("mask", masks), ("aux", aux_masks))):
            uncertain = self._uncertain_points(logits, matches, truth, valid)  # (M, P)
            # All voxels have been compared already, or these have not.
            of_pairs = None
            if sums is not None and uncertain is None:
                of_pairs = PairSums(*(x[s, q, t] for x in sums[index]))
            bce, dice = matched_mask_losses(logits, truth, valid, (s, q, t), uncertain, of_pairs, piece)
            terms[f"{name}_bce"], terms[f"{name}_dice"] = bce / total, dice / total
        wanted, found, whole = targets.boxes[s, t], boxes[s, q], targets.whole[s]
        terms["box_l1"] = box_distance(found, wanted, whole).sum() / total
        terms["box_giou"] = ((1 - generalised_iou(found, wanted)) * whole).sum() / total
        return terms

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)  # (S, N): "no object"
        wanted[matches.slices, matches.queries] = targets.classes[matches.slices, matches.targets]
        none = wanted == self.num_classes
        weight = torch.where(none, self.loss.no_object, 1.0)
        if targets.valid is not None:
            weight = weight * targets.valid.flatten(1).any(1)[:, None]  # not slices that are wholly ignored
            if self.config.anchored:  # a class that is not labelled may be there
                weight = weight.masked_fill(none & ~targets.whole[:, None], 0.0)
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return (losses * weight).sum() / _mean_over_ranks(weight.sum()).clamp(min=1e-6)

    def _uncertain_points(self, logits: Tensor, matches: Matches, truth: Tensor, valid: Tensor | None) -> Tensor | None:
        """Voxels (M, P) at which matched masks are compared; None for all."""
        loss, s = self.loss, matches.slices
        if logits.shape[-1] <= loss.num_points:
            return None
        of_pairs = None if valid is None else valid[s]
        sampling = loss.num_points, loss.oversample, loss.uncertain_fraction
        return uncertain_points(logits, (s, matches.queries), of_pairs, *sampling, truth[s, matches.targets])


def _mean_over_ranks(count: Tensor) -> Tensor:
    """DDP averages gradients over ranks, so sums are divided by the mean count to be normalised by the whole."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count
