"""From masks and classes to nnU-Net's semantic output."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def semantic_log_probabilities(class_logits: Tensor, mask_logits: Tensor, regions: bool = False) -> Tensor:
    """What nnU-Net expects of a network, computed in float32.

    nnU-Net averages it over windows, mirrors and folds and then applies softmax (sigmoid with regions), so classes are
    returned as log-probabilities and regions as the logits of their scores. The sum over queries is MaskFormer's
    (arXiv 2107.06278); what no mask covers goes to background.

    Args:
        class_logits: (B, D, N, K + 1), "no object" last.
        mask_logits: (B, D, N, H, W).
        regions: K overlapping regions instead of K classes of which the first is background.

    Returns:
        (B, K, D, H, W)
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        classes = class_logits.float().softmax(-1)[..., :-1]  # (B, D, N, K)
        masks = mask_logits.float().sigmoid().flatten(-2)  # (B, D, N, H W)
        scores = (classes.transpose(-1, -2) @ masks).unflatten(-1, mask_logits.shape[-2:])  # (B, D, K, H, W)
        scores = scores.transpose(1, 2)  # (B, K, D, H, W)
        if regions:
            return scores.clamp(EPSILON, 1 - EPSILON).logit()
        uncovered = (1 - scores.sum(1, keepdim=True)).clamp(min=0)
        scores = torch.cat([scores[:, :1] + uncovered, scores[:, 1:]], dim=1) + EPSILON
        return scores.log() - scores.sum(1, keepdim=True).log()
