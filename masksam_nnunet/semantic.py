"""From masks and classes to nnU-Net's semantic output, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def semantic_log_probabilities(class_logits: Tensor, mask_logits: Tensor, regions: bool, anchored: bool) -> Tensor:
    """What nnU-Net expects of a network, which averages it over windows, mirrors and folds and then applies softmax
    (sigmoid with regions): classes as log-probabilities, regions as logits.

    Args:
        class_logits: (B, D, N, K + 1), "no object" last.
        mask_logits: (B, D, N, H, W).
        regions: K overlapping regions instead of K classes of which the first is background.
        anchored: N / K queries belong to each class, in order.

    Returns:
        (B, K, D, H, W)
    """
    combine = _of_anchored if anchored else _of_free
    with torch.autocast(mask_logits.device.type, enabled=False):
        return combine(class_logits.float(), mask_logits.float(), regions).transpose(1, 2)


def _of_anchored(class_logits: Tensor, mask_logits: Tensor, regions: bool) -> Tensor:
    """Each query speaks for its own class; normalised, as background has queries of its own.

    As long as all classes are equally sure, the result is the classes whose masks these are: no sum is clamped.
    """
    queries, classes = class_logits.shape[2], class_logits.shape[3] - 1
    own = torch.arange(queries, device=class_logits.device) // (queries // classes)
    sure = class_logits.log_softmax(-1)[..., torch.arange(queries, device=own.device), own]  # (B, D, N)
    sure = sure[..., None, None]
    if regions:
        return union_logits(mask_logits + sure, classes, dim=2)
    scores = F.logsigmoid(mask_logits) + sure
    return scores.unflatten(2, (classes, -1)).logsumexp(3).log_softmax(2)  # (B, D, K, H, W)


def union_logits(logits: Tensor, classes: int, dim: int) -> Tensor:
    """The logit of "at least one" for each class, from the logits of its queries: N to K along ``dim``."""
    if logits.shape[dim] == classes:
        return logits
    total = F.softplus(logits).unflatten(dim, (classes, -1)).sum(dim + 1)
    return _logit_of_complement(-total)


def _of_free(class_logits: Tensor, mask_logits: Tensor, regions: bool) -> Tensor:
    """MaskFormer's sum over queries (arXiv 2107.06278); what no mask covers goes to background.

    Regions are joined as independent events: a sum would have to be clamped, without a gradient.
    """
    *classes, none = class_logits.softmax(-1).unbind(-1)  # each (B, D, N)
    masks = mask_logits.sigmoid()
    if regions:
        return torch.stack([_logit_of_complement(_log_of_neither(c, masks)) for c in classes], dim=2)
    scores = torch.einsum("bdnk,bdnhw->bdkhw", torch.stack(classes, dim=-1), masks)
    uncovered = _log_of_neither(1 - none, masks).exp()
    scores = torch.cat([scores[:, :, :1] + uncovered[:, :, None], scores[:, :, 1:]], dim=2) + EPSILON
    return scores.log() - scores.sum(2, keepdim=True).log()


def _log_of_neither(shares: Tensor, masks: Tensor) -> Tensor:
    """log of the product over queries of 1 - share x mask: (B, D, N) and (B, D, N, H, W) to (B, D, H, W)."""
    below_one = 1 - torch.finfo(masks.dtype).eps
    return torch.log1p(-(shares[..., None, None] * masks).clamp(max=below_one)).sum(2)


def _logit_of_complement(log_p: Tensor) -> Tensor:
    """logit(1 - p), from log p."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).tiny))) - log_p
