"""SAM's prompt encoder, fed by the prompt generator."""

from __future__ import annotations

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from ..config import Grid
from .mask_embedding import mask_features
from .prompt_generator import Prompts, scaled_boxes
from .trainable import DepthEmbedding


class AdaptedPromptEncoder(nn.Module):
    """Embeds boxes and masks as SAM does; the dense positional encoding learns to tell slices apart.

    soft prompts: mask logits and differentiable boxes. hard prompts: masks of 0 and 1 and whole pixels, as in the
    released code, which no gradient passes.
    """

    def __init__(self, sam: PromptEncoder, grid: Grid, hard: bool = False) -> None:
        super().__init__()
        self.sam = sam
        self.grid = grid
        self.hard = hard
        self.depth_embedding = DepthEmbedding(grid.patch[0], sam.embed_dim)

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Returns embeddings of boxes (B, N, D, 2, P) and features of masks (B, N, D, g_h, g_w, 16)."""
        height, width = self.grid.image
        boxes, masks = scaled_boxes(prompts.boxes, width, height), prompts.mask_logits
        if self.hard:
            boxes, masks = boxes.detach().floor(), (masks.detach() > 0).to(masks.dtype)
        lead = masks.shape[:3]
        with torch.autocast(masks.device.type, enabled=False):  # sines of large angles need float32
            sparse, _ = self.sam(points=None, boxes=boxes.float().flatten(0, 2), masks=None)
        features = mask_features(self.sam.mask_downscaling, masks.flatten(0, 2))
        return sparse.unflatten(0, lead), features.unflatten(0, lead)

    def dense_pe(self) -> Tensor:
        """The positional encoding of the token grid, (D, P, g_h, g_w)."""
        with torch.autocast(self.depth_embedding.weight.device.type, enabled=False):
            plane = self.sam.get_dense_pe()  # (1, P, g_h, g_w)
        return plane + self.depth_embedding()[:, :, None, None]
