"""Voxels at which masks are compared (PointRend, arXiv 1912.08193; Mask2Former, arXiv 2112.01527)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision


def draw(rows: int, size: int, number: int, known: Tensor | None, device: torch.device) -> Tensor:
    """``number`` voxels of ``size`` for each row, uniformly and with replacement: (rows, number).

    ``known`` (rows, size) tells which may be drawn; None for all.
    """
    if known is None:
        return torch.randint(size, (rows, number), device=device)
    if not rows:
        return torch.zeros(0, number, dtype=torch.long, device=device)
    weight = torch.where(known.any(1, keepdim=True), known, True).float()  # a row of nothing known counts nowhere
    return weight.multinomial(number, replacement=True)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    pairs: tuple[Tensor, Tensor],
    known: Tensor | None,
    number: int,
    oversample: float,
    fraction: float,
) -> Tensor:
    """For each pair, ``number`` voxels, the given fraction of them those of ``oversample`` times as many whose logits
    are nearest to 0: (M, number).

    Args:
        logits: (B, D, N, V).
        pairs: slice and query of each pair, (M,).
        known: (M, V), False at voxels that must not be drawn; None for all.
    """
    s, q = pairs
    _, depth, _, size = logits.shape
    candidates = draw(len(s), size, int(number * oversample), known, logits.device)
    at = (s // depth)[:, None], (s % depth)[:, None], q[:, None], candidates
    chosen = int(number * fraction)
    nearest = full_precision(logits[at]).abs().topk(chosen, dim=1, largest=False, sorted=False).indices
    others = draw(len(s), size, number - chosen, known, logits.device) if chosen < number else candidates[:, :0]
    return torch.cat([candidates.gather(1, nearest), others], dim=1)
