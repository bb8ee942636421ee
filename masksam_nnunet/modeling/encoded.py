"""What the decoders of the related methods are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..config import Grid
from .geometry import to_patch


class Encoded(NamedTuple):
    """A batch of patches, seen by the image encoder."""

    volume: Tensor
    """The patch (B, C, D, H, W)."""
    levels: list[Tensor]
    """As the backbone declares them, (B, D, h, w, E)."""
    neck: Tensor
    """The image embedding (B, D, P, g_h, g_w)."""
    pe: Tensor | None
    """Positions of the token grid (1, P, g_h, g_w); None where the network has no prompt encoder."""
    no_mask: Tensor | None
    """SAM's embedding of "no mask prompt", (P,)."""

    def of_patch(self, maps: Tensor, grid: Grid) -> Tensor:
        """Maps (B D, K, h, w) of the padded slices as (B, K, D, H, W) of the patch."""
        return to_patch(maps.unflatten(0, self.neck.shape[:2]).transpose(1, 2), grid)
