"""SAM's mask decoder without prompts: a token for each class, all decoded together, or each class by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from .blocks import Trainable
from .compute import recomputed
from .encoded import Encoded
from .geometry import to_patch

FEWEST = 8
"""Channels that are left, at least, where maps are doubled: a norm of one is always zero."""


class ClassHead(Trainable):
    """For each class tokens, and an MLP that turns a decoded one into its weights of the upscaled features.

    Its layers are named as nnU-Net's segmentation layers, so that ``-pretrained_weights`` may change K.
    """

    def __init__(self, num_classes: int, width: int, channels: int, layers: int = 3) -> None:
        super().__init__()
        mlps = nn.ModuleList(MLP(width, width, channels, layers) for _ in range(num_classes))
        self.seg_layers = nn.ModuleDict({"tokens": nn.Embedding(num_classes, width), "mlps": mlps})

    @property
    def tokens(self) -> Tensor:
        """(K, P)"""
        layer: Any = self.seg_layers["tokens"]
        return layer.weight

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Maps (M, K, h, w) of decoded tokens (M, K, P) and features (M, c, h, w)."""
        mlps: Any = self.seg_layers["mlps"]
        weights = torch.stack([mlp(tokens[:, k]) for k, mlp in enumerate(mlps)], dim=1)  # (M, K, c)
        return (weights @ features.flatten(2)).unflatten(2, features.shape[2:])


class Upscaling(Trainable):
    """Doublings of height and width, each halving the channels as long as more than eight are left."""

    def __init__(self, channels: int, doublings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(doublings):
            halved = max(FEWEST, channels // 2)
            layers += [nn.ConvTranspose2d(channels, halved, kernel_size=2, stride=2), LayerNorm2d(halved), nn.GELU()]
            channels = halved
        self.layers = nn.Sequential(*layers)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(M, channels', h', w'), from (M, channels, h, w)."""
        return self.layers(x)


def doublings_to_patch(config: MaskSAMConfig) -> int:
    """How often SAM's upscaled masks, at four times the token grid, are doubled to have the patch's size."""
    grid = Grid.of(config)
    return max(0, int(math.log2(grid.padded[0] / grid.tokens[0])) - 2)


class SAMDecoder(MaskDecoder):
    """SAM's mask decoder, whose own parameters have SAM's names."""

    def __init__(self, config: MaskSAMConfig) -> None:
        backbone = config.encoder
        width = backbone.prompt_width
        transformer = TwoWayTransformer(2, width, backbone.decoder_heads, backbone.decoder_mlp)
        super().__init__(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width)
        self.grid = Grid.of(config)

    def embedding(self, encoded: Encoded) -> Tensor:
        """The slices' embeddings without a mask prompt, (B D, P, g_h, g_w)."""
        assert encoded.no_mask is not None
        return encoded.neck.flatten(0, 1) + encoded.no_mask[:, None, None]

    def attend(self, image: Tensor, pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (M, T, P) and the image (M, P, g_h, g_w) after they have attended to each other."""
        tokens, keys = self.transformer(image, pe.expand(len(image), -1, -1, -1), tokens)
        return tokens, keys.transpose(1, 2).unflatten(2, image.shape[2:])


class ClassTokenDecoder(SAMDecoder):
    """A token for each class in place of SAM's mask tokens (SAMed, arXiv 2304.13785), decoded slice by slice.

    SAM's token for the quality of masks stays as an input; the head that would read it is not trained. With
    ``to_patch_size`` the maps are doubled on, to the patch's size (MA-SAM, arXiv 2309.08842).
    """

    def __init__(self, config: MaskSAMConfig, _: int, num_classes: int, to_patch_size: bool = False) -> None:
        super().__init__(config)
        width = config.encoder.prompt_width
        self.finer = Upscaling(width // 8, doublings_to_patch(config) if to_patch_size else 0)
        self.classes = ClassHead(num_classes, width, self.finer.channels)

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return [self.iou_prediction_head, self.mask_tokens, self.output_hypernetworks_mlps]

    def decode(self, encoded: Encoded, more: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded tokens (M, K + more, P), the decoded image (M, P, g_h, g_w), SAM's features (M, P/8, 4 g_h, 4 g_w).

        ``more``: tokens (n, P) beside those of the classes.
        """
        assert encoded.pe is not None
        image = self.embedding(encoded)
        tokens = torch.cat([self.iou_token.weight, self.classes.tokens, *more]).to(image.dtype)
        decoded, image = self.attend(image, encoded.pe, tokens.expand(len(image), -1, -1))
        return decoded[:, 1:], image, self.output_upscaling(image)

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        tokens, _, features = self.decode(encoded)
        return (encoded.of_patch(self.classes(tokens, self.finer(features)), self.grid),)


class PerClassDecoder(SAMDecoder):
    """SAM's decoder for each class by itself, as it decodes one object: the second token gives the map."""

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return [self.iou_prediction_head, *self.output_hypernetworks_mlps[1:]]

    def decode_classes(self, encoded: Encoded, tokens: Iterable[Tensor], prompts: Iterable[Tensor]) -> Tensor:
        """Maps (B, K, D, H, W).

        Args:
            encoded: the batch.
            tokens: of each class, (T, P).
            prompts: of each class, dense, (B, D, P, g_h, g_w) or the same for all slices, (P, 1, 1).
        """
        one = [
            recomputed(self.training, self._one, encoded.neck, encoded.pe, own_tokens, own_prompt)
            for own_tokens, own_prompt in zip(tokens, prompts, strict=True)
        ]  # a class at a time, and again in the backward pass: K images would be kept
        return to_patch(torch.stack(one, dim=1), self.grid)

    def _one(self, neck: Tensor, pe: Tensor, tokens: Tensor, prompt: Tensor) -> Tensor:
        """The map of a class, (B, D, 4 g_h, 4 g_w)."""
        image = (neck + prompt).flatten(0, 1)
        decoded, image = self.attend(image, pe, tokens.to(image.dtype).expand(len(image), -1, -1))
        weights = self.output_hypernetworks_mlps[0](decoded[:, 1])  # (B D, P/8)
        features = self.output_upscaling(image)
        maps = (weights[:, None] @ features.flatten(2)).unflatten(2, features.shape[2:])  # (B D, 1, 4 g_h, 4 g_w)
        return maps[:, 0].unflatten(0, neck.shape[:2])


class OwnTokens(Trainable):
    """Learned tokens of each class, (K, T, P). Named as nnU-Net's segmentation layers, as in :class:`ClassHead`."""

    def __init__(self, num_classes: int, number: int, width: int) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleDict({"tokens": nn.Embedding(num_classes * number, width)})
        self.number = number

    def forward(self) -> Tensor:
        layer: Any = self.seg_layers["tokens"]
        weight: Tensor = layer.weight
        return weight.unflatten(0, (-1, self.number))


class TokensOfClasses(PerClassDecoder):
    """AutoSAM's ViT head (arXiv 2306.13731): for each class a token for quality and two for masks."""

    def __init__(self, config: MaskSAMConfig, _: int, num_classes: int) -> None:
        super().__init__(config)
        self.own = OwnTokens(num_classes, 3, config.encoder.prompt_width)

    def unused(self) -> list[nn.Module]:
        """Modules whose output is never read."""
        return [*super().unused(), self.iou_token, self.mask_tokens]

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        assert encoded.no_mask is not None
        tokens = self.own()  # (K, 3, P)
        return (self.decode_classes(encoded, tokens, [encoded.no_mask[:, None, None]] * len(tokens)),)
