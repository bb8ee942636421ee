"""SAM's prompt encoder, fed by the prompt generator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from .blocks import DepthEmbedding
from .compute import norm, shrink
from .geometry import scaled_boxes


class AdaptedPromptEncoder(PromptEncoder):
    """Embeds boxes and masks as SAM does; the dense positional encoding learns to tell slices apart.

    soft prompts: mask logits and differentiable boxes. hard prompts: masks of 0 and 1 and whole pixels, as in the
    released code, which no gradient passes. Its own parameters have SAM's names.
    """

    def __init__(self, config: MaskSAMConfig) -> None:
        grid, backbone = Grid.of(config), config.encoder
        super().__init__(
            embed_dim=backbone.prompt_width,
            image_embedding_size=grid.tokens,
            input_image_size=grid.image,
            mask_in_chans=backbone.mask_channels,
        )
        self.grid = grid
        self.hard = config.prompts == "hard"
        self.depth_embedding = DepthEmbedding(grid.patch[0], self.embed_dim)

    def unused(self) -> list[nn.Module]:
        """Parts of SAM whose output is never read."""
        return [self.point_embeddings[0], self.point_embeddings[1], self.not_a_point_embed, self.no_mask_embed]

    def forward(self, boxes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Embed prompts.

        Args:
            boxes: (B, N, D, 4), x0 y0 x1 y1 as shares of the SAM input.
            masks: logits (B, N, D, 4 g_h, 4 g_w).

        Returns:
            Embeddings of boxes (B, N, D, 2, P) and of masks (B, N, D, g_h, g_w, P).
        """
        height, width = self.grid.image
        boxes = scaled_boxes(boxes, width, height)
        if self.hard:
            boxes, masks = boxes.detach().floor(), (masks.detach() > 0).to(masks.dtype)
        lead = masks.shape[:3]
        with torch.autocast(masks.device.type, enabled=False):  # sines of large angles need float32
            sparse = self._embed_boxes(boxes.float().flatten(0, 2))
        return sparse.unflatten(0, lead), self._dense(masks.flatten(0, 2)).unflatten(0, lead)

    def _dense(self, masks: Tensor) -> Tensor:
        """SAM's convolutions, channels last: (M, 4 g_h, 4 g_w) to (M, g_h, g_w, P)."""
        layers: list[Any] = list(self.mask_downscaling)
        first, norm_1, act_1, second, norm_2, act_2, last = layers
        x = masks.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # (M, g_h, 4, g_w, 4)
        m, h, _, w, _ = x.shape
        x = x.permute(0, 1, 3, 2, 4).reshape(-1, 1, 4, 4)  # (M g_h g_w, 1, 4, 4)
        x = act_1(norm(norm_1, shrink(first, x)))  # (M g_h g_w, 2, 2, 4)
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as x has them
        x = F.linear(x.flatten(1), weight, second.bias)
        x = act_2(norm(norm_2, x))  # (M g_h g_w, 16)
        return F.linear(x, last.weight.flatten(1), last.bias).reshape(m, h, w, -1)

    def dense_pe(self) -> Tensor:
        """The positional encoding of the token grid, (D, P, g_h, g_w)."""
        with torch.autocast(self.depth_embedding.weight.device.type, enabled=False):
            plane = self.get_dense_pe()  # (1, P, g_h, g_w)
        return plane + self.depth_embedding()[:, :, None, None]
