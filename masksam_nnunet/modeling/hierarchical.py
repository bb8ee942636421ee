"""H-SAM's decoder (arXiv 2403.18271): a second decoder that is led by the maps of the first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from ..config import MaskSAMConfig
from .attention import decoder_attention
from .blocks import Trainable
from .class_decoder import ClassHead, ClassTokenDecoder, SAMDecoder, Upscaling, doublings_to_patch
from .encoded import Encoded

SIDE = 16
"""Of the grid on which maps of classes are compared: a width must not depend on the patch."""
LEAST = -30.0
"""Least log-probability: a class that is nowhere still sees the image, also in float16."""


class LedBlock(TwoWayAttentionBlock):
    """SAM's two-way block, in which the probabilities of a class lead what its token sees of the image."""

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, log_p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens (M, T, P) and the image (M, n, P), with their positions and log-probabilities (M, T, n)."""
        q = queries if self.skip_first_layer_pe else queries + query_pe
        out = decoder_attention(self.self_attn, q, q, queries)
        queries = self.norm1(out if self.skip_first_layer_pe else queries + out)
        led = decoder_attention(self.cross_attn_token_to_image, queries + query_pe, keys + key_pe, keys, log_p)
        queries = self.norm2(queries + led)
        queries = self.norm3(queries + self.mlp(queries))
        out = decoder_attention(self.cross_attn_image_to_token, keys + key_pe, queries + query_pe, queries)
        return queries, self.norm4(keys + out)


class LedTransformer(TwoWayTransformer):
    """SAM's two-way transformer of such blocks."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__(0, width, heads, mlp)
        self.layers = nn.ModuleList(LedBlock(width, heads, mlp, skip_first_layer_pe=i == 0) for i in range(2))

    def forward(self, image: Tensor, pe: Tensor, tokens: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Decode tokens (M, K, P) over the image (M, P, h, w) with log-probabilities (M, K, h w)."""
        keys, key_pe = (x.flatten(2).transpose(1, 2) for x in (image, pe))
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe, log_p)
        led = decoder_attention(self.final_attn_token_to_image, queries + tokens, keys + key_pe, keys, log_p)
        return self.norm_final_attn(queries + led), keys.transpose(1, 2).unflatten(2, image.shape[2:])


class MaskGate(nn.Module):
    """Which pixels matter, from how alike they are to each class: (M, K, h, w) to shares (M, 1, h, w).

    Classes attend to each other twice. The authors' gate is a softmax over its one channel, which is 1 everywhere and
    has no gradient; here it is a sigmoid.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width = SIDE**2
        self.attentions = nn.ModuleList(Attention(width, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = MLPBlock(width, 2048)
        self.seg_layers = nn.ModuleList([nn.Conv2d(num_classes, 1, kernel_size=1)])

    def forward(self, alike: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(alike, SIDE).flatten(2)  # (M, K, 256)
        x = self.norms[0](decoder_attention(self.attentions[0], x, x, x))
        x = decoder_attention(self.attentions[1], x, x, x)
        x = self.norms[1](x + self.mlp(x)).unflatten(2, (SIDE, SIDE))
        x = F.interpolate(x.float(), size=alike.shape[2:], mode="bilinear", align_corners=False).to(x.dtype)
        share: Tensor = self.seg_layers[0](x)
        return share.sigmoid()


class SecondStage(Trainable):
    """The second decoder, with random weights at first."""

    def __init__(self, config: MaskSAMConfig, num_classes: int) -> None:
        super().__init__()
        backbone = config.encoder
        width = backbone.prompt_width
        self.gate = MaskGate(num_classes)
        self.transformer = LedTransformer(width, backbone.decoder_heads, backbone.decoder_mlp)
        self.upscaling = SAMDecoder(config).output_upscaling
        self.finer = Upscaling(width // 4, doublings_to_patch(config))
        self.classes = ClassHead(num_classes, width, self.finer.channels, layers=5)

    def forward(
        self, image: Tensor, pe: Tensor, alike: Tensor, features: Tensor, maps: Tensor, regions: bool
    ) -> Tensor:
        """Maps (M, K, H', W').

        Args:
            image: the embedding (M, P, g_h, g_w).
            pe: positions (M, P, g_h, g_w).
            alike: products of the first stage's tokens and image, (M, K, g_h, g_w).
            features: the first stage's, (M, P/8, 4 g_h, 4 g_w).
            maps: the first stage's, (M, K, 4 g_h, 4 g_w).
            regions: whether classes overlap.
        """
        image = image + image * self.gate(alike)
        coarse = F.avg_pool2d(maps, 4).flatten(2).float()  # (M, K, g_h g_w)
        log_p = F.logsigmoid(coarse) if regions else coarse.log_softmax(1)
        log_p = log_p.clamp(min=LEAST)
        tokens = self.classes.tokens.to(image.dtype).expand(len(image), -1, -1)
        tokens, image = self.transformer(image, pe, tokens, log_p)
        joined = torch.cat([self.upscaling(image), features], dim=1)  # (M, P/4, 4 g_h, 4 g_w)
        return self.classes(tokens, self.finer(joined))


class HierarchicalDecoder(ClassTokenDecoder):
    """A decoder of class tokens and a second one. Gives the mean of both, the second's maps, the first's.

    The released code's noise on the second stage's embeddings, which needs the truth in the network, is left out.
    """

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_classes: int) -> None:
        super().__init__(config, in_channels, num_classes)
        self.second = SecondStage(config, num_classes)
        self.regions = config.regions

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        assert encoded.pe is not None
        tokens, image, features = self.decode(encoded)
        first = self.classes(tokens, features)  # (M, K, 4 g_h, 4 g_w)
        alike = (tokens @ image.flatten(2)).unflatten(2, image.shape[2:])
        embedding = self.embedding(encoded)
        pe = encoded.pe.expand(len(embedding), -1, -1, -1)
        second = self.second(embedding, pe, alike, features, first, self.regions)
        maps = [encoded.of_patch(x, self.grid) for x in (second, first)]
        return (maps[0] + maps[1]) / 2, *maps
