"""From any number of channels to the three of SAM's input."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import Grid
from .blocks import Trainable, VoxelNorm, conv_block, double_in_plane, zero_
from .geometry import pad, to_image

RESIDUAL_WIDTH = 8  # channels at the full SAM input, where memory is dearest


class InputStem(Trainable):
    """3D convolutions whose result is added to the plain image, and is zero at first.

    The plain image is the mean of the image channels, repeated to three and enlarged by u: at step 0 SAM sees the
    z-scored image itself. ``forward`` takes (B, C, D, H, W) and returns the SAM input (B, D, 3, S_h, S_w) and the
    features at patch resolution (B, stem_width, D, H, W).
    """

    def __init__(self, in_channels: int, image_channels: int, width: int, upsample: int, grid: Grid) -> None:
        super().__init__()
        self.image_channels = image_channels  # a cascade's one-hot channels come after these
        self.grid = grid
        self.features = conv_block(in_channels, width, num_convs=2, norm=VoxelNorm)
        layers: list[nn.Module] = []
        doublings = upsample.bit_length() - 1
        for index in range(doublings):
            out = RESIDUAL_WIDTH * 2 ** (doublings - 1 - index)
            layers += [double_in_plane(width, out), nn.GELU()]
            width = out
        last = nn.Conv3d(width, 3, kernel_size=1)
        zero_(last)
        self.residual = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)  # (B, stem_width, D, H, W)
        plain = to_image(x[:, : self.image_channels].mean(1), self.grid)  # (B, D, S_h, S_w)
        residual = self.residual(pad(features, self.grid))  # (B, 3, D, S_h, S_w)
        return plain[:, :, None] + residual.transpose(1, 2), features
