"""The image encoders, each declared once. The config, the weights, the planner and the command line read them here.

Nothing heavy is imported: what builds a network is named by its import path and looked up when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any, Literal


@dataclass(frozen=True)
class Level:
    """A map of features that an encoder returns for the prompt generator."""

    width: int
    scale: int = 1
    """Its height and width as a multiple of the token grid's: 1, 2 or 4."""
    feeds: int = 1
    """The scale of the generator's map that it joins, at least its own."""


@dataclass(frozen=True)
class Backbone:
    """Sizes of an image encoder and of the SAM decoder that goes with it, and where its weights come from."""

    name: str
    width: int
    """E: channels of a ViT's tokens, and of its four levels."""
    depth: int = 0
    """Blocks of the ViT."""
    heads: int = 0
    global_blocks: tuple[int, ...] = ()
    """Blocks with global attention, whose outputs are the four levels."""
    window: int = 14
    """Side of the windows in which the other blocks attend; 0 for global attention throughout."""
    stride: int = 16
    """s: pixels of the input for each token, along each axis."""
    image_size: int = 1024
    """Largest side of the images that it was trained on, in pixels."""
    levels: tuple[Level, ...] = ()
    """What feeds the prompt generator beside the neck, shallow to deep, at least one for each of the scales 1, 2 and 4;
    () for a ViT's: four of width E on the token grid, of which the first joins scale 4, the second and third 2."""
    intensities: Literal["imagenet", "unit"] = "imagenet"
    """How the image reaches the encoder: "unit" as values from 0 (black) to 1 (white), "imagenet" as such values after
    ImageNet's mean and deviation, which is SAM's rule."""
    learns_input: bool = True
    """Whether the gradient reaches the image, so that the stem may add a learned residual to it. False where the layers
    before the first adapter are too expensive for that."""
    prompt_width: int = 256
    """P, a square number."""
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    mask_channels: int = 16
    """Channels of a mask prompt before the last layer that embeds it."""
    checkpoint: str | None = None
    """The published file of the weights, which stay frozen, by its name. None: whatever ``encoder`` does not freeze is
    trained from random weights."""
    adapter: str | Callable[..., Any] = "masksam_nnunet.modeling.adapters:DConvAdapter"
    """Makes an adapter from (a block's width E, bottleneck's share of E): two for each transformer block, each a
    ``Trainable`` map of (B, D, h, w, E) to the same shape that is zero at first."""
    encoder: str | Callable[..., Any] = "masksam_nnunet.modeling.image_encoder:AdaptedImageEncoder"
    """Makes the encoder from (this declaration, the network's config). Its ``forward`` takes images (B, D, 3, S_h, S_w)
    and returns the levels, each (B, D, scale g_h, scale g_w, width), and a neck (B, D, P, g_h, g_w)."""
    description: str = "a registered encoder. It is not SAM, and no file of SAM is read"

    def make_adapter(self, width: int, ratio: float) -> Any:
        """An adapter, or with a ratio of 0 one that is always zero and costs nothing."""
        return _resolved(self.adapter if ratio else "masksam_nnunet.modeling.adapters:NoAdapter")(width, ratio)

    @property
    def fed_levels(self) -> tuple[Level, ...]:
        """The declared levels, or a ViT's."""
        return self.levels or tuple(Level(self.width, feeds=scale) for scale in (4, 2, 2, 1))

    def make_encoder(self, config: Any) -> Any:
        return _resolved(self.encoder)(self, config)


def _resolved(maker: str | Callable[..., Any]) -> Callable[..., Any]:
    return resolve_name(maker) if isinstance(maker, str) else maker


def _sam(name: str, width: int, depth: int, heads: int, global_blocks: tuple[int, ...]) -> Backbone:
    """A SAM that Meta released; sizes as in ``segment_anything/build_sam.py``."""
    description, sizes = f"SAM's {name}, frozen, with trained adapters", (width, depth, heads, global_blocks)
    return Backbone(name, *sizes, checkpoint=f"sam_{name}", description=description)


def _tiny_vit(name: str, **settings: Any) -> Backbone:
    """TinyViT with SAM's prompt encoder and mask decoder."""
    levels = (Level(64, 4, 4), Level(128, 2, 2), Level(160), Level(320))
    return Backbone(
        *(name, 320),
        levels=levels,
        learns_input=False,
        encoder="masksam_nnunet.modeling.tiny_vit:AdaptedTinyViT",
        checkpoint=name,
        **settings,
    )


_VIT_B = _sam("vit_b", 768, 12, 12, (2, 5, 8, 11))

BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            *("tiny", 128, 4, 4, (0, 1, 2, 3)),
            window=0,
            prompt_width=64,
            decoder_mlp=128,
            decoder_heads=4,
            description="a tiny encoder of this project's own. It is not SAM: it starts from random weights and is "
            "trained throughout",
        ),
        _tiny_vit(
            "lite_medsam",
            stride=4,
            image_size=256,
            intensities="unit",
            description="LiteMedSAM's TinyViT, frozen, with trained adapters",
        ),
        _tiny_vit("mobile_sam", description="MobileSAM's TinyViT, frozen, with trained adapters"),
        _VIT_B,
        replace(
            _VIT_B,
            name="medsam_vit_b",
            intensities="unit",
            checkpoint="medsam_vit_b",
            description="MedSAM's ViT-B, frozen, with trained adapters",
        ),
        _sam("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        _sam("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    )
}
"""Every known backbone by its name."""

_OWN = frozenset(BACKBONES)


def register_backbone(backbone: Backbone) -> None:
    """Make ``backbone`` one that configs, and so plans and trainers, may name.

    Call it in the module that holds the trainer. Registering a name again replaces it, as nnU-Net may import that
    module more than once.

    Raises:
        ValueError: the name is one of this project's own, or SAM's checkpoint does not fit the encoder.
    """
    if backbone.name in _OWN:
        raise ValueError(f"backbone {backbone.name!r} is this project's own: register yours under another name")
    ours = [BACKBONES[name].encoder for name in _OWN]
    if backbone.checkpoint is not None and backbone.encoder not in ours:
        raise ValueError(
            f"backbone {backbone.name!r}: checkpoint = {backbone.checkpoint} does not fit an encoder of your own: "
            "leave it out, and load and freeze what you have in the function that makes the encoder"
        )
    BACKBONES[backbone.name] = backbone
