"""From any number of channels to the three of SAM's input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Z_SCORES, Grid, MaskSAMConfig
from .blocks import Trainable, VoxelNorm, conv_block, double_in_plane, zero_
from .geometry import pad, to_image

RESIDUAL_WIDTH = 8  # channels at the full SAM input, where memory is dearest
IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}  # of R, G, B


class InputStem(Trainable):
    """The image as SAM expects it, and a learned residual that is zero at first.

    The values of each channel become shares of the way from black to white, and SAM's R, G, B a mix of them: at first
    one channel each, in turn, as the mean of channels cancels what they show with opposite signs. 3D convolutions make
    the residual, where the backbone learns its input. ``forward`` takes (B, C, D, H, W) and returns the SAM input
    (B, D, 3, S_h, S_w) and the features at patch resolution (B, stem_width, D, H, W), None where nobody needs them.
    ``plain``: the image alone, for methods that have neither.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    deviation: Tensor
    mix: Tensor

    def __init__(self, config: MaskSAMConfig, in_channels: int, image_channels: int, plain: bool = False) -> None:
        super().__init__()
        ranges = config.intensity_ranges or (Z_SCORES,) * image_channels
        if len(ranges) != image_channels:
            raise ValueError(
                f"intensity_ranges = {ranges} are for {len(ranges)} image channels, there are {image_channels}: plan "
                "again"
            )
        self.image_channels = image_channels  # a cascade's one-hot channels come after these
        self.grid = Grid.of(config)
        self.as_imagenet = config.encoder.intensities == "imagenet"
        learns = config.encoder.learns_input and not (config.forward_only or plain)
        # The U-Net has features at patch resolution itself.
        wanted = learns or (config.generator.kind == "light" and not plain)
        self.features = conv_block(in_channels, config.stem_width, num_convs=2, norm=VoxelNorm) if wanted else None
        bounds = dict(zip(("low", "high"), zip(*ranges, strict=True), strict=True))
        for name, values in {**bounds, **IMAGENET}.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)
        mix = torch.eye(image_channels)[torch.arange(3) % image_channels]  # (3, image channels)
        if config.forward_only and image_channels > 3:  # what is not learned must lose none of them
            mix = F.one_hot(torch.arange(image_channels) % 3, 3).T.float()
            mix = mix / mix.sum(1, keepdim=True)
        if image_channels == 1 or config.forward_only:
            self.register_buffer("mix", mix, persistent=False)
        else:
            self.mix = nn.Parameter(mix)
        self.residual = self._residual(config) if learns else None

    @staticmethod
    def _residual(config: MaskSAMConfig) -> nn.Module:
        layers: list[nn.Module] = []
        width, doublings = config.stem_width, round(config.resolution).bit_length() - 1
        for index in range(doublings):
            out = RESIDUAL_WIDTH * 2 ** (doublings - 1 - index)
            layers += [double_in_plane(width, out), nn.GELU()]
            width = out
        if config.resolution < 1:
            side = round(1 / config.resolution)
            layers += [nn.Conv3d(width, RESIDUAL_WIDTH, kernel_size=(1, side, side), stride=(1, side, side)), nn.GELU()]
            width = RESIDUAL_WIDTH
        last = nn.Conv3d(width, 3, kernel_size=1)
        zero_(last)
        return nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = None if self.features is None else self.features(x)  # (B, stem_width, D, H, W)
        images = to_image(self._plain(x[:, : self.image_channels]), self.grid)  # (B, 3, D, S_h, S_w)
        if self.residual is not None and features is not None:
            images = images + self.residual(pad(features, self.grid))
        return images.transpose(1, 2), features

    def _plain(self, x: Tensor) -> Tensor:
        """The image in R, G, B, (B, 3, D, H, W), in the backbone's units; zeros are what it is padded with."""
        shares = (x - self.low) / (self.high - self.low)
        rgb = torch.einsum("rc,bcdhw->brdhw", self.mix, shares)
        if self.as_imagenet:
            rgb = (rgb - self.mean.to(rgb.dtype)) / self.deviation.to(rgb.dtype)
        return rgb
