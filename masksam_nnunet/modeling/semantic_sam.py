"""The network of the methods that predict a map for each class: encoder, decoder, and nothing between that is not
theirs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from ..config import MaskSAMConfig
from ..errors import ConfigError
from .blocks import Trainable, zero_
from .compute import full_precision, recomputed
from .encoded import Encoded
from .geometry import to_tokens
from .sam_network import SAMNetwork
from .stem import InputStem


class NoPrompts(PromptEncoder):
    """SAM's prompt encoder without a prompt. Its own parameters have SAM's names."""

    def unused(self) -> list[nn.Module]:
        """All but the embedding of "no mask"."""
        return [self.point_embeddings, self.not_a_point_embed, self.mask_downscaling]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Positions (1, P, g_h, g_w), and the embedding of "no mask", (P,)."""
        with torch.autocast(self.no_mask_embed.weight.device.type, enabled=False):  # sines of large angles
            return self.get_dense_pe(), self.no_mask_embed.weight[0]


class PreviousStage(Trainable):
    """The label map of a cascade's first stage, added to the image embedding; zero at first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(channels, width, kernel_size=1)
        zero_(self.project)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.project(x)
        return projected.transpose(1, 2)  # (B, D, P, g_h, g_w)


class SemanticSAM(SAMNetwork):
    """A method whose decoder gives maps of classes.

    In training mode ``forward`` returns maps of logits, as nnU-Net's networks do; in evaluation mode
    log-probabilities, logits of regions.
    """

    def __init__(
        self, config: MaskSAMConfig, in_channels: int, num_classes: int, image_channels: int | None = None
    ) -> None:
        super().__init__(config, in_channels, num_classes, image_channels)
        backbone, method = config.encoder, self.method
        assert method.decoder is not None  # build_network takes this network for such methods only
        self.stem = InputStem(config, in_channels, self.image_channels, plain=True)
        self.image_encoder = backbone.make_encoder(config)
        if method.adaptation.changes_blocks and not hasattr(self.image_encoder, "takes_adaptations"):
            raise ConfigError(
                f"method = {config.method!r} changes the blocks of the image encoder, which that of backbone "
                f"{config.backbone!r} does not offer: use one of this project's own backbones"
            )
        self.prompt_encoder: NoPrompts | None = None
        if any(name.startswith("prompt_encoder") for name in method.sam):
            self.prompt_encoder = NoPrompts(
                backbone.prompt_width, self.grid.tokens, self.grid.image, backbone.mask_channels
            )
        self.mask_decoder = method.decoder(config, in_channels, num_classes)
        extra = 0 if method.unet else in_channels - self.image_channels  # a U-Net sees them itself
        self.previous_stage = PreviousStage(extra, backbone.prompt_width) if extra else None
        self.freeze()

    def unused(self) -> Iterable[nn.Module]:
        unused: list[nn.Module] = self.mask_decoder.unused()
        if self.prompt_encoder is not None:
            unused = unused + self.prompt_encoder.unused()
            if hasattr(self.mask_decoder, "gives_prompts"):
                unused.append(self.prompt_encoder.no_mask_embed)
        return unused

    def semantic(self, output: tuple[Tensor, ...]) -> Tensor:
        """Classes as log-probabilities, regions as logits, (B, K, D, H, W)."""
        return output[0] if self.config.regions else full_precision(output[0]).log_softmax(1)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, K, d, h, w) of the patch, or of strides of it; the first has its size and is what is predicted."""
        saving = self.config.checkpointing and self.training
        volume = self.as_volume(x)
        images, _ = self.stem(volume)  # (B, D, 3, S_h, S_w)
        levels, neck = self.image_encoder(images)
        if self.previous_stage is not None:
            neck = neck + self.previous_stage(to_tokens(volume[:, self.image_channels :], self.grid))
        pe, no_mask = self.prompt_encoder() if self.prompt_encoder is not None else (None, None)
        return recomputed(saving, self.mask_decoder, Encoded(volume, levels, neck, pe, no_mask))
