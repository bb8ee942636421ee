"""The description of a MaskSAM network and its losses: a frozen, validated dataclass that is the same as plain JSON.

C (image channels) and K (segmentation heads) are not in it: nnU-Net passes them when it builds a network, so that
cascades, and plans moved between datasets, stay right.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from .backbones import BACKBONES, Backbone
from .errors import ConfigError
from .method import MASKSAM, find_method, methods

MAX_SIZE = 2**15
"""Limit of anything counted in voxels, channels or queries: no memory holds more, so more is a typing error."""
MOST_PARTS = 32
"""Limit of a U-Net's stages, and of the blocks of a stage: those that nnU-Net plans have ten and six."""

RESOLUTIONS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes at which SAM may see a patch, in-plane, as multiples of the patch."""
Z_SCORES = (-1.0, 3.5)
"""Black and white of z-scored images: about the lowest value and the 99.5th percentile of whole MR images (measured in
docs/results.md)."""

Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Weight = Annotated[float, Field(strict=True, ge=0, le=1e30, allow_inf_nan=False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

_Config = TypeVar("_Config", bound=type)


def _raises_config_errors(cls: _Config) -> _Config:
    """Let the constructor of a pydantic dataclass raise :class:`ConfigError`."""
    validate = cls.__init__  # type: ignore[misc]

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        try:
            validate(self, *args, **options)
        except ValidationError as error:
            raise _config_error(cls.__name__, error) from None

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _config_error(kind: str, error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    option = ".".join(map(str, first["loc"])) or kind
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    return ConfigError(f"{option} = {first['input']!r} is not allowed: {reason}.")


_OTHER_VERSION = (
    "The config was edited or written by another version of masksam-nnunet: plan again, or use that version."
)


class _Json:
    """Strict conversion between a config and plain JSON types."""

    def to_json(self) -> dict[str, Any]:
        """The config as nested dicts, lists, numbers, strings and booleans."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: an unknown or a missing key, or a value that is not allowed.
        """
        try:
            config = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ConfigError(f"{_config_error(cls.__name__, error)} {_OTHER_VERSION}") from None
        # Every option must be there: a default of this version need not be that of the version that wrote the file.
        whole = config.to_json()
        missing = [*(whole.keys() - data.keys())]
        for part, content in whole.items():
            if isinstance(content, dict):
                missing += content.keys() - data.get(part, {}).keys()
        if missing:
            raise ConfigError(f"{cls.__name__} lacks {', '.join(sorted(missing))}. {_OTHER_VERSION}")
        return config


_NO_EXTRA = ConfigDict(extra="forbid")


@_raises_config_errors
@dataclass(frozen=True, config=_NO_EXTRA)
class LossConfig(_Json):
    """Weights of the loss terms, which are the weights of the matching costs too, and how masks are compared.

    The defaults are the paper's for ACDC and Synapse (arXiv 2403.14103); points as in Mask2Former (arXiv 2112.01527).
    """

    class_weight: Weight = 0.2
    mask_bce: Weight = 1.5
    mask_dice: Weight = 1.5
    aux_bce: Weight = 0.5
    aux_dice: Weight = 0.5
    box_l1: Weight = 0.5
    box_giou: Weight = 0.2
    no_object: Weight = 0.1
    """Weight of the class "no object" in the classification."""
    semantic: Weight = 1.0
    """Weight of nnU-Net's own Dice + cross-entropy on the semantic log-probabilities; 0 leaves it out."""
    generator: Weight = 1.0
    """Weight of nnU-Net's loss on the prompt generator's class maps, which only matching "class" has."""
    num_points: Count = 2 * 128 * 128
    """Voxels of a slice at which masks are compared; a slice with fewer is compared at all of them."""
    oversample: Annotated[Weight, Field(ge=1)] = 2.0
    """Candidates drawn for each point that is chosen by uncertainty."""
    uncertain_fraction: Annotated[Weight, Field(le=1)] = 0.75
    """Share of the points that are chosen by uncertainty; the others are uniform."""


@_raises_config_errors
@dataclass(frozen=True, config=_NO_EXTRA)
class LightConfig(_Json):
    """A prompt generator that decodes SAM's features alone."""

    widths: tuple[Size, Size, Size] = (256, 128, 64)
    """Channels at once, twice and four times the token grid."""
    kind: Literal["light"] = "light"

    @property
    def line(self) -> str:
        """All of it in short."""
        return f"light:{'-'.join(map(str, self.widths))}"


Triple = tuple[Size, Size, Size]


@_raises_config_errors
@dataclass(frozen=True, config=_NO_EXTRA)
class UNetConfig(_Json):
    """A prompt generator that is nnU-Net's planned U-Net, SAM's features added to its skips.

    Stages are listed from the finest to the bottleneck; kernels and strides are (depth, height, width).
    """

    features: tuple[Size, ...]
    kernel_sizes: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    blocks: tuple[Annotated[int, Field(strict=True, ge=1, le=MOST_PARTS)], ...]
    """Convolutions, or residual blocks, of each stage of the encoder."""
    residual: StrictBool = False
    """nnU-Net's residual encoder instead of its plain one."""
    kind: Literal["unet"] = "unet"

    @model_validator(mode="after")
    def _has_stages(self) -> Self:
        lengths = {len(x) for x in (self.features, self.kernel_sizes, self.strides, self.blocks)}
        if len(lengths) != 1 or not 2 <= min(lengths) <= MOST_PARTS:
            raise ValueError(
                f"features, kernel_sizes, strides and blocks need one entry for each of 2 to {MOST_PARTS} stages"
            )
        return self

    @property
    def line(self) -> str:
        """All of it in short."""
        kernels, strides = (
            ",".join("x".join(map(str, sizes)) for sizes in listed) for listed in (self.kernel_sizes, self.strides)
        )
        features, blocks = ("-".join(map(str, numbers)) for numbers in (self.features, self.blocks))
        return f"{'residual ' if self.residual else ''}unet:{features}:{kernels}:{strides}:{blocks}"


@_raises_config_errors
@dataclass(frozen=True, config=_NO_EXTRA)
class MaskSAMConfig(_Json):
    """All that defines a MaskSAM network, except its numbers of input channels and classes.

    ``patch_size`` is nnU-Net's, in voxels: (D, H, W), the slice axis first; or (H, W) for 2D, which is D = 1 inside.
    """

    backbone: StrictStr
    """The image encoder: a name in :data:`masksam_nnunet.backbones.BACKBONES`."""
    patch_size: Annotated[tuple[Size, ...], Field(min_length=2, max_length=3)]
    resolution: float
    """r: how much larger in-plane SAM sees the patch; one of :data:`RESOLUTIONS`."""
    num_queries: Size = 1
    """Queries of each class and slice with matching "class"; else of each slice, whatever their class."""
    matching: Literal["class", "slice", "volume"] = "class"
    """class: queries belong to classes from the start, and the generator's masks are class maps (ours); slice: an
    assignment of queries to targets for each slice (the paper); volume: for each volume, so that a query keeps its
    class along depth (ours)."""
    generator: LightConfig | UNetConfig = Field(default_factory=LightConfig, discriminator="kind")
    intensity_ranges: tuple[tuple[Finite, Finite], ...] = ()
    """For each image channel, the values after nnU-Net's normalisation that reach SAM as black and as white; () for
    :data:`Z_SCORES` in all channels."""
    regions: StrictBool = False
    """Whether the dataset's classes are overlapping regions, for which nnU-Net applies a sigmoid."""
    stem_width: Size = 32
    """Channels of the stem's features at patch resolution."""
    head_width: Size = 32
    """Channels of the mask head's residual."""
    adapter_ratio: Annotated[Weight, Field(gt=0, le=1)] = 0.25
    """Bottleneck of the adapters as a share of the width they adapt."""
    encoder_adapters: StrictBool = True
    """Whether the image encoder has adapters, or what else adapts it; if not, a frozen one is run forward only."""
    prompts: Literal["soft", "hard"] = "soft"
    """soft: logits and differentiable boxes prompt the mask decoder (ours); hard: thresholded ones (released code)."""
    checkpointing: StrictBool = False
    """Recompute activations in the backward pass instead of keeping them."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    method: StrictStr = MASKSAM
    """How SAM is adapted: a name in :func:`masksam_nnunet.method.methods`. What other methods do not have, such as
    queries, they do not read."""

    @field_validator("method")
    @classmethod
    def _is_method(cls, name: str) -> str:
        if name != MASKSAM and name not in methods():
            raise ValueError(f"choose one of {', '.join(methods())}")
        return name

    @field_validator("backbone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"choose one of {', '.join(BACKBONES)}, or import the module that registers yours")
        return name

    @field_validator("resolution", mode="before")
    @classmethod
    def _is_resolution(cls, value: Any) -> float:
        if isinstance(value, bool) or value not in RESOLUTIONS:  # True equals 1
            raise ValueError(f"choose one of {', '.join(f'{r:g}' for r in RESOLUTIONS)}")
        return float(value)

    @field_validator("intensity_ranges")
    @classmethod
    def _is_increasing(cls, ranges: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(low >= high for low, high in ranges):
            raise ValueError("black must lie below white")
        return ranges

    @model_validator(mode="after")
    def _unet_makes_class_maps(self) -> Self:
        if self.generator.kind == "unet" and not self.anchored:
            raise ValueError(f"matching = {self.matching!r} goes with the light generator only")
        return self

    @model_validator(mode="after")
    def _method_has_its_unet(self) -> Self:
        if self.method != MASKSAM and find_method(self.method).unet and self.generator.kind != "unet":
            raise ValueError(f"method = {self.method!r} needs a generator of kind 'unet', not {self.generator.kind!r}")
        return self

    @property
    def architecture(self) -> str:
        """What decides the shape and meaning of the parameters, in one line: networks share weights if these agree.

        K, C and all that only training sees are left out.
        """
        patch = "x".join(map(str, self.patch_size))
        ranges = ",".join(f"{low:.4g}:{high:.4g}" for low, high in self.intensity_ranges)
        method = "" if self.method == MASKSAM else f"method={self.method} "
        return (
            f"{method}backbone={self.backbone} patch_size={patch} resolution={self.resolution:g} "
            f"matching={self.matching} num_queries={self.num_queries} generator={self.generator.line} "
            f"widths={self.stem_width}-{self.head_width} adapters={self.encoder_ratio:g}-{self.adapter_ratio:g} "
            f"prompts={self.prompts} regions={self.regions} ranges={ranges}"
        )

    @property
    def anchored(self) -> bool:
        """Whether each query belongs to a class."""
        return self.matching == "class"

    def queries(self, num_classes: int) -> int:
        """N: masks predicted for each slice, for K classes. Those of a class follow each other."""
        return self.num_queries * (num_classes if self.anchored else 1)

    @property
    def encoder_ratio(self) -> float:
        """Bottleneck of the image encoder's adapters; 0 for none."""
        beside = find_method(self.method).adaptation.beside
        return self.adapter_ratio if self.encoder_adapters and beside else 0.0

    @property
    def forward_only(self) -> bool:
        """Whether no gradient enters the image encoder."""
        return self.sam is not None and not self.encoder_adapters

    @property
    def encoder(self) -> Backbone:
        """The declaration of the image encoder."""
        return BACKBONES[self.backbone]

    @property
    def sam(self) -> str | None:
        """Which of SAM's published checkpoints a training starts from; None for none."""
        return self.encoder.checkpoint


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sizes that follow from the patch, r and the encoder's stride s. All in-plane sizes are (height, width)."""

    patch: tuple[int, int, int]
    """(D, H, W) in voxels; D = 1 for a 2D patch."""
    padded: tuple[int, int]
    """The patch, padded at its lower right so that SAM's input is a multiple of s, in patch voxels."""
    image: tuple[int, int]
    """SAM's input (S_h, S_w) in pixels: r times ``padded``."""
    tokens: tuple[int, int]
    """The token grid (g_h, g_w)."""
    masks: tuple[int, int]
    """SAM's mask-prompt and mask-output size (4 g_h, 4 g_w)."""

    @classmethod
    def of(cls, config: MaskSAMConfig) -> Grid:
        *depth, height, width = config.patch_size
        stride = config.encoder.stride
        step = int(stride / config.resolution)  # patch voxels that a token covers
        rows, columns = -(-height // step), -(-width // step)
        return cls(
            patch=(depth[0] if depth else 1, height, width),
            padded=(rows * step, columns * step),
            image=(rows * stride, columns * stride),
            tokens=(rows, columns),
            masks=(rows * 4, columns * 4),
        )
