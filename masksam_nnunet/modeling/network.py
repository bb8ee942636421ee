"""The network, assembled from its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from ..precision import autocast
from ..semantic import semantic_log_probabilities
from . import lean
from .backbones.registry import SPECS, build_image_encoder, build_mask_decoder, build_prompt_encoder
from .image_encoder import AdaptedImageEncoder
from .mask_decoder import AdaptedMaskDecoder
from .mask_head import MaskHead
from .prompt_encoder import AdaptedPromptEncoder
from .prompt_generator import PromptGenerator
from .recompute import recomputed
from .stem import InputStem
from .trainable import freeze, freeze_all_but_trainable


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


class MaskSAM(nn.Module):
    """MaskSAM (arXiv 2403.14103): SAM as a semantic segmenter of volumes, without a user.

    In training mode ``forward`` returns a :class:`MaskSAMOutput`; in evaluation mode nnU-Net's semantic output,
    log-probabilities (B, K, D, H, W), or (B, K, H, W) for a 2D patch.

    Args:
        config: all but the numbers of channels and classes.
        in_channels: C, with a cascade's one-hot channels.
        num_classes: K, nnU-Net's ``num_segmentation_heads``.
        image_channels: how many of the C are image channels, the first ones; all if not given.
    """

    def __init__(
        self, config: MaskSAMConfig, in_channels: int, num_classes: int, image_channels: int | None = None
    ) -> None:
        super().__init__()
        image_channels = in_channels if image_channels is None else image_channels
        if in_channels < 1 or num_classes < 1:
            raise ValueError(
                f"in_channels = {in_channels}, num_classes = {num_classes}: MaskSAM needs at least one of each"
            )
        if not 1 <= image_channels <= in_channels:
            raise ValueError(f"image_channels = {image_channels} must lie between 1 and in_channels = {in_channels}")
        self.config = config
        self.grid = grid = Grid.of(config)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.sam_is_loaded = False
        """Whether the SAM parts hold weights from a file: SAM's own, or a checkpoint of this network."""
        spec = SPECS[config.backbone]
        depth, ratio, keep_less = grid.patch[0], config.adapter_ratio, config.checkpointing

        self.stem = InputStem(in_channels, image_channels, config.stem_width, config.upsample, grid)
        self.image_encoder: nn.Module = (
            spec.encoder(spec, grid)
            if spec.encoder is not None
            else AdaptedImageEncoder(
                build_image_encoder(spec, grid),
                spec.global_blocks,
                depth,
                ratio,
                keep_less,
                config.needs_sam,
                spec.adapter,
            )
        )
        self.prompt_generator = PromptGenerator(
            spec.width, spec.prompt_width, config.generator_widths, depth, config.num_queries
        )
        self.prompt_encoder = AdaptedPromptEncoder(
            build_prompt_encoder(spec, grid), grid, hard=config.prompts == "hard"
        )
        self.mask_decoder = AdaptedMaskDecoder(
            build_mask_decoder(spec), depth, num_classes, ratio, keep_less or config.needs_sam
        )
        self.mask_head = MaskHead(
            config.num_queries, config.generator_widths[-1], config.stem_width, config.head_width, grid
        )
        # nnU-Net's loaders of foreign weights compare keys, and name those that are missing: so this key names the
        # config, and a checkpoint of another one is refused in words.
        self.register_buffer(config_key(config), torch.zeros(0))
        lean.prepare(self)

        if config.needs_sam:
            freeze_all_but_trainable(self)
        prompt = self.prompt_encoder.sam
        unused_prompts = [prompt.point_embeddings[0], prompt.point_embeddings[1], prompt.not_a_point_embed]
        freeze([*self.mask_decoder.unused(), *unused_prompts, prompt.no_mask_embed])
        self.register_load_state_dict_post_hook(_mark_loaded)

    def sam_parts(self) -> dict[str, nn.Module]:
        """SAM's own modules, under the names its checkpoints give them; no image encoder where it is another's."""
        parts = {name: getattr(self, name) for name in ("image_encoder", "prompt_encoder", "mask_decoder")}
        return {name: part.sam for name, part in parts.items() if hasattr(part, "sam")}

    def parts(self, x: Tensor) -> MaskSAMOutput:
        """All that the network computes for (B, C, D, H, W), or (B, C, H, W), whatever its mode."""
        x = self._as_volume(x)
        images, stem = self.stem(x)  # (B, D, 3, S_h, S_w), (B, w, D, H, W)
        levels, neck = self.image_encoder(images)
        saving = self.config.checkpointing and self.training
        prompts = recomputed(saving, self.prompt_generator, levels, neck)
        sparse, features = recomputed(saving, self.prompt_encoder, prompts)
        masks, classes = self.mask_decoder(
            neck,
            self.prompt_encoder.dense_pe(),
            sparse,
            features,
            self.prompt_encoder.sam.mask_downscaling,
            prompts.class_tokens,
        )
        masks = recomputed(saving, self.mask_head, masks, prompts.features, stem)  # (B, N, D, H, W)
        return MaskSAMOutput(*(t.transpose(1, 2) for t in (classes, masks, prompts.mask_logits, prompts.boxes)))

    def forward(self, x: Tensor) -> MaskSAMOutput | Tensor:
        if self.training:
            return self.parts(x)
        with self._trained_precision(x.device):
            output = self.parts(x)
        semantic = semantic_log_probabilities(output.class_logits, output.mask_logits, self.config.regions)
        return semantic[:, :, 0] if x.ndim == 4 else semantic

    def _trained_precision(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        # nnU-Net predicts in float16; what was trained in bfloat16 may not fit its range.
        if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            return autocast(device)
        return contextlib.nullcontext()

    def _as_volume(self, x: Tensor) -> Tensor:
        expected = (self.in_channels, *self.config.patch_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: this one was built for (batch, {', '.join(map(str, expected))}), "
                f"that is {self.in_channels} channels and the patch {self.config.patch_size} of its plans. "
                "Use the plans, configuration and channels it was trained with."
            )
        return x[:, :, None] if x.ndim == 4 else x


def config_key(config: MaskSAMConfig) -> str:
    """The name of the empty buffer that tells checkpoints of different configs apart."""
    return f"MaskSAM config {config.architecture}".replace(".", "_")


def count_parameters(network: MaskSAM) -> Iterator[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) for each part of the network, and for the whole, which comes last."""

    def row(name: str, module: nn.Module) -> tuple[str, int, int]:
        parameters = list(module.parameters())
        return name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    for name, module in network.named_children():
        yield row(name, module)
    yield row("total", network)


def _mark_loaded(module: nn.Module, _: object) -> None:
    module.sam_is_loaded = True  # type: ignore[assignment]
