"""HQ-SAM's decoder (arXiv 2306.01567): finer features, and a second token for each class that reads them."""

from __future__ import annotations

from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import MaskSAMConfig
from .blocks import Trainable
from .class_decoder import ClassHead, ClassTokenDecoder
from .encoded import Encoded


class FinerFeatures(Trainable):
    """SAM's upscaled features, image embedding and first level of the encoder, added at four times the token grid."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        first, width = backbone.fed_levels[0], backbone.prompt_width
        fine = width // 8
        self.from_level = _to_scale_4(first.width, width, fine, first.scale)
        self.from_neck = _to_scale_4(width, width // 4, fine, 1)
        self.from_features = nn.Sequential(
            nn.Conv2d(fine, 2 * fine, kernel_size=3, padding=1),
            LayerNorm2d(2 * fine),
            nn.GELU(),
            nn.Conv2d(2 * fine, fine, kernel_size=3, padding=1),
        )

    def forward(self, features: Tensor, level: Tensor, neck: Tensor) -> Tensor:
        """(M, P/8, 4 g_h, 4 g_w), from such features, the level (M, E, h, w) and the neck (M, P, g_h, g_w)."""
        return self.from_features(features) + self.from_level(level) + self.from_neck(neck)


def _to_scale_4(in_channels: int, hidden: int, out_channels: int, scale: int) -> nn.Module:
    """Two layers, each of which doubles the size as long as it is below four times the token grid."""

    def layer(a: int, b: int, doubles: bool) -> nn.Module:
        side = 2 if doubles else 1
        return nn.ConvTranspose2d(a, b, kernel_size=side, stride=side)

    return nn.Sequential(
        layer(in_channels, hidden, scale < 4), LayerNorm2d(hidden), nn.GELU(), layer(hidden, out_channels, scale < 2)
    )


class HQDecoder(ClassTokenDecoder):
    """A decoder of class tokens whose maps are corrected by tokens over finer features.

    HQ-SAM corrects the mask of a user's prompt and trains nothing of SAM's decoder. There is no user here: class tokens
    take the prompt's place, and the decoder is trained too.
    """

    def __init__(self, config: MaskSAMConfig, in_channels: int, num_classes: int) -> None:
        super().__init__(config, in_channels, num_classes)
        width = config.encoder.prompt_width
        self.finer_features = FinerFeatures(config.encoder)
        self.finer_classes = ClassHead(num_classes, width, width // 8)

    def forward(self, encoded: Encoded) -> tuple[Tensor, ...]:
        tokens, _, features = self.decode(encoded, (self.finer_classes.tokens,))
        own, finer = tokens.chunk(2, dim=1)  # (M, K, P) each
        level = encoded.levels[0].flatten(0, 1).permute(0, 3, 1, 2)  # (M, E, h, w)
        fused = self.finer_features(features, level, encoded.neck.flatten(0, 1))
        maps = self.classes(own, features) + self.finer_classes(finer, fused)
        return (encoded.of_patch(maps, self.grid),)
