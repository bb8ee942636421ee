"""The network, assembled from its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MaskSAMConfig
from ..sam_checkpoint import read_checkpoint, remap_sam_state_dict
from ..semantic import semantic_log_probabilities, union_logits
from .compute import recomputed
from .mask_decoder import AdaptedMaskDecoder
from .mask_head import MaskHead
from .prompt_encoder import AdaptedPromptEncoder
from .prompt_generator import PromptGenerator, Prompts
from .sam_network import SAMNetwork
from .stem import InputStem

FOREIGN = -1e4
"""The logit of a class that a query does not belong to; finite also in float16."""
TOKENS_PER_CHUNK = 2**15
"""Image tokens over all masks that are decoded at once: 8 masks of a 64x64 grid."""


def queries_at_once(config: MaskSAMConfig, queries: int, tokens: int, training: bool) -> int:
    """How many of N queries are decoded together; ``tokens``: of the image, over all slices of the batch.

    The embedding of a mask prompt is large, so many are decoded a few at a time, and again in the backward pass. Only a
    network that is trained throughout decodes all at once, which is faster.
    """
    if training and not (config.checkpointing or config.sam):
        return queries
    return min(queries, max(1, TOKENS_PER_CHUNK // tokens))


class MaskSAMOutput(NamedTuple):
    """What the losses see."""

    class_logits: Tensor
    """(B, D, N, K + 1), "no object" last."""
    mask_logits: Tensor
    """(B, D, N, H, W)"""
    aux_mask_logits: Tensor
    """(B, D, N, 4 g_h, 4 g_w): the prompt generator's masks, over the padded patch."""
    aux_boxes: Tensor
    """(B, D, N, 4): x0 y0 x1 y1 in [0, 1] of the padded patch, as given to SAM."""
    class_maps: tuple[Tensor, ...] = ()
    """Where queries belong to classes: the generator's own semantic output, the finest first, logits (B, K, d, h, w)
    for nnU-Net's loss."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> MaskSAMOutput:
        """What queries give, each tensor changed; without the class maps."""
        queries = self.class_logits, self.mask_logits, self.aux_mask_logits, self.aux_boxes
        classes, masks, aux_masks, boxes = map(change, queries)
        return MaskSAMOutput(classes, masks, aux_masks, boxes)


class MaskSAM(SAMNetwork):
    """MaskSAM (arXiv 2403.14103): SAM as a semantic segmenter of volumes, without a user.

    In training mode ``forward`` returns a :class:`MaskSAMOutput`; in evaluation mode log-probabilities, logits of
    regions.
    """

    def __init__(
        self, config: MaskSAMConfig, in_channels: int, num_classes: int, image_channels: int | None = None
    ) -> None:
        super().__init__(config, in_channels, num_classes, image_channels)
        backbone, grid = config.encoder, self.grid
        self.stem = InputStem(config, in_channels, self.image_channels)
        self.image_encoder = backbone.make_encoder(config)
        self.num_queries = config.queries(num_classes)
        self.prompt_generator = PromptGenerator(config, in_channels, self.num_queries)
        self.prompt_encoder = AdaptedPromptEncoder(config)
        self.mask_decoder = AdaptedMaskDecoder(config, grid.patch[0], num_classes)
        widths = self.prompt_generator.decoder.widths[:1] + ((config.stem_width,) if self.stem.features else ())
        on_grid = int(config.generator.kind == "light")  # the generator's own; the stem's are of the patch
        self.mask_head = MaskHead(self.num_queries, widths, on_grid, config.head_width, grid, config.anchored)
        self.freeze()

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        parts = self.mask_decoder, self.prompt_encoder, self.prompt_generator.decoder
        return [module for part in parts for module in part.unused()]

    def semantic(self, output: MaskSAMOutput) -> Tensor:
        """Classes as log-probabilities, regions as logits, (B, K, D, H, W)."""
        config = self.config
        return semantic_log_probabilities(output.class_logits, output.mask_logits, config.regions, config.anchored)

    def outputs(self, x: Tensor) -> MaskSAMOutput:
        """See :meth:`SAMNetwork.outputs`."""
        saving = self.config.checkpointing and self.training
        volume = self.as_volume(x)
        images, stem = self.stem(volume)  # (B, D, 3, S_h, S_w), (B, w, D, H, W) or None
        levels, neck = self.image_encoder(images)
        prompts: Prompts = recomputed(saving, self.prompt_generator, volume, levels, neck)
        masks, classes = self.decode(neck, prompts)
        features = (prompts.features,) if stem is None else (prompts.features, stem)
        masks = recomputed(saving, self.mask_head, masks, prompts.start, *features)  # (B, N, D, H, W)
        if self.config.anchored:
            classes = self._of_all_classes(classes)
        return MaskSAMOutput(
            class_logits=classes.transpose(1, 2),
            mask_logits=masks.transpose(1, 2),
            aux_mask_logits=prompts.mask_logits.transpose(1, 2),
            aux_boxes=prompts.boxes.transpose(1, 2),
            class_maps=tuple(map(self._class_map, prompts.maps)),
        )

    def _of_all_classes(self, own: Tensor) -> Tensor:
        """Class logits (B, N, D, K + 1), from those of each query's own class against "no object", (B, N, D, 1)."""
        owner = torch.arange(self.num_queries, device=own.device) // self.config.num_queries
        foreign = F.one_hot(owner, self.num_classes)[:, None] == 0  # (N, 1, K)
        logits = own.expand(-1, -1, -1, self.num_classes).masked_fill(foreign, FOREIGN)
        return F.pad(logits, (0, 1))

    def _class_map(self, queries: Tensor) -> Tensor:
        """Logits of classes, (B, K, ...), from those of their queries."""
        if self.config.regions or self.num_queries == self.num_classes:
            return union_logits(queries, self.num_classes, dim=1)
        return queries.unflatten(1, (self.num_classes, -1)).logsumexp(2)

    def decode(self, neck: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Mask logits (B, N, D, 4 g_h, 4 g_w) and class logits (B, N, D, K + 1) of the neck's output
        (B, D, P, g_h, g_w) and prompts; where queries belong to classes, the logit of that class alone, (B, N, D, 1).
        Queries are independent."""
        pe = self.prompt_encoder.dense_pe()  # (D, P, g_h, g_w)

        def decode(boxes: Tensor, masks: Tensor, class_tokens: Tensor) -> tuple[Tensor, Tensor]:
            sparse, dense = self.prompt_encoder(boxes, masks)
            return self.mask_decoder(neck, pe, sparse, dense, class_tokens)

        given = prompts.boxes, prompts.mask_logits, prompts.class_tokens
        size = queries_at_once(self.config, self.num_queries, neck.numel() // neck.shape[2], self.training)
        if size == self.num_queries:
            return recomputed(self.training and self.config.checkpointing, decode, *given)
        chunks = zip(*(x.split(size, dim=1) for x in given), strict=True)
        masks, classes = zip(*(recomputed(self.training, decode, *chunk) for chunk in chunks), strict=True)
        return torch.cat(masks, dim=1), torch.cat(classes, dim=1)


def check_sam_file(path: Path, backbone: str) -> None:
    """Raise WeightsError unless the checkpoint at ``path`` has all that a network with ``backbone`` needs of SAM."""
    with torch.device("meta"):
        network = MaskSAM(MaskSAMConfig(backbone, (1, 64, 64), 1), 1, 1)
    remap_sam_state_dict(read_checkpoint(path).tensors, {name: x.shape for name, x in network.sam_tensors().items()})
