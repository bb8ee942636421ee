"""The description of a MaskSAM network and its losses: a frozen dataclass that is the same thing as plain JSON.

C (image channels) and K (segmentation heads) are not in it: nnU-Net passes them when it builds a network, so that
cascades, and plans moved between datasets, stay right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .errors import MaskSAMError

BACKBONES = ("tiny", "vit_b", "vit_l", "vit_h")
"""Those of this project, between which planning chooses."""
SAM_OF: dict[str, str | None] = {"tiny": None, "vit_b": "vit_b", "vit_l": "vit_l", "vit_h": "vit_h"}
"""Every known backbone, and the released SAM whose weights it holds; modeling.register_backbone adds others."""
UPSAMPLING = (1, 2, 4)
MAX_SIZE = 2**15
"""Of anything counted in voxels, channels or queries: more is a slip of the pen, and no memory holds it."""
MATCHING = ("slice", "volume")
PROMPTS = ("soft", "hard")

_Config = TypeVar("_Config", bound="_JsonConfig")


_LARGEST = 1e30


class ConfigError(MaskSAMError, ValueError):
    """A MaskSAM config that cannot be: the message names the option, the value received and the remedy."""


class _JsonConfig:
    """Strict conversion between a frozen dataclass and plain JSON types."""

    def to_json(self) -> dict[str, Any]:
        """The config as nested dicts, lists, numbers, strings and booleans."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_json(cls: type[_Config], data: Mapping[str, Any]) -> _Config:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: for an unknown or a missing key, or a value that is not allowed.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__} must be a JSON object, got {type(data).__name__}: {data!r}")
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(data) - set(names))
        missing = sorted(set(names) - set(data))
        if unknown or missing:
            raise ConfigError(
                f"{cls.__name__}: unknown keys {unknown}, missing keys {missing}. "
                f"The config was written by another version of masksam-nnunet, or edited: expected exactly {names}."
            )
        return cls(**cls._decode(dict(data)))

    @classmethod
    def _decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        return data


def _plain(value: Any) -> Any:
    if isinstance(value, _JsonConfig):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


def _check(ok: bool, option: str, value: object, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{option} = {value!r} is not allowed: {remedy}.")


def _is_int(value: object, minimum: int, maximum: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_number(value: object, minimum: float = 0.0) -> bool:
    # Compared, not asked whether it is finite: JSON holds integers that no float does.
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= _LARGEST


@dataclass(frozen=True)
class LossConfig(_JsonConfig):
    """Weights of the loss terms, which are the weights of the matching costs too, and how masks are compared.

    The defaults are the paper's for ACDC and Synapse (arXiv 2403.14103); points as in Mask2Former (arXiv 2112.01527).
    """

    class_weight: float = 0.2
    mask_bce: float = 1.5
    mask_dice: float = 1.5
    aux_bce: float = 0.5
    aux_dice: float = 0.5
    box_l1: float = 0.5
    box_giou: float = 0.2
    no_object: float = 0.1
    """Weight of the class "no object" in the classification."""
    semantic: float = 1.0
    """Weight of nnU-Net's own Dice + cross-entropy on the semantic log-probabilities; 0 leaves it out."""
    num_points: int = 2 * 128 * 128
    """Voxels of a slice at which masks are compared; a slice with fewer is compared at all of them."""
    oversample: float = 2.0
    """Candidates drawn for each point that is chosen by uncertainty."""
    uncertain_fraction: float = 0.75
    """Share of the points that are chosen by uncertainty; the others are uniform."""
    matching: Literal["slice", "volume"] = "slice"
    """One assignment per slice (the paper), or one per volume, where a query keeps its class along depth (ours)."""

    def __post_init__(self) -> None:
        for name in (
            "class_weight",
            "mask_bce",
            "mask_dice",
            "aux_bce",
            "aux_dice",
            "box_l1",
            "box_giou",
            "no_object",
            "semantic",
        ):
            _check(_is_number(getattr(self, name)), f"loss.{name}", getattr(self, name), "give a number >= 0")
        _check(_is_int(self.num_points, 1), "loss.num_points", self.num_points, "give an integer >= 1")
        _check(_is_number(self.oversample, 1.0), "loss.oversample", self.oversample, "give a number >= 1")
        _check(
            _is_number(self.uncertain_fraction) and self.uncertain_fraction <= 1,
            "loss.uncertain_fraction",
            self.uncertain_fraction,
            "give a number in [0, 1]",
        )
        _check(self.matching in MATCHING, "loss.matching", self.matching, f"choose one of {MATCHING}")


@dataclass(frozen=True)
class MaskSAMConfig(_JsonConfig):
    """All that a MaskSAM network is, but for its numbers of input channels and classes.

    ``patch_size`` is nnU-Net's, in voxels: (D, H, W), the slice axis first; or (H, W) for 2D, which is D = 1 inside.
    """

    backbone: str
    """SAM's image encoder: vit_b, vit_l, vit_h; or tiny, a tiny one of ours, not SAM, that starts from nothing; or
    one that ``modeling.register_backbone`` has been given."""
    patch_size: tuple[int, ...]
    upsample: int
    """u: how much larger in-plane SAM sees the patch; 1, 2 or 4."""
    num_queries: int
    """N: masks predicted for each slice."""
    regions: bool = False
    """Whether the dataset's classes are overlapping regions, for which nnU-Net applies a sigmoid."""
    stem_width: int = 32
    """Channels of the stem's features at patch resolution."""
    generator_widths: tuple[int, int, int] = (256, 128, 64)
    """Channels of the prompt generator at strides 16, 8 and 4 of the SAM input."""
    head_width: int = 32
    """Channels of the mask head's residual."""
    adapter_ratio: float = 0.25
    """Bottleneck of the adapters as a share of the width they adapt."""
    prompts: Literal["soft", "hard"] = "soft"
    """soft: logits and differentiable boxes prompt the mask decoder (ours); hard: thresholded ones (released code)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        _check(
            isinstance(self.backbone, str) and self.backbone in SAM_OF,
            "backbone",
            self.backbone,
            f"choose one of {tuple(SAM_OF)}, or import the module that registers yours",
        )
        object.__setattr__(self, "patch_size", _int_tuple("patch_size", self.patch_size))
        _check(
            len(self.patch_size) in (2, 3), "patch_size", self.patch_size, "give (D, H, W), or (H, W) for a 2D network"
        )
        _check(
            _is_int(self.upsample, 1) and self.upsample in UPSAMPLING,
            "upsample",
            self.upsample,
            f"choose one of {UPSAMPLING}",
        )
        _check(
            _is_int(self.num_queries, 1, MAX_SIZE),
            "num_queries",
            self.num_queries,
            f"give an integer from 1 to {MAX_SIZE}",
        )
        object.__setattr__(self, "generator_widths", _int_tuple("generator_widths", self.generator_widths))
        _check(len(self.generator_widths) == 3, "generator_widths", self.generator_widths, "give three integers")
        for name in ("stem_width", "head_width"):
            _check(
                _is_int(getattr(self, name), 1, MAX_SIZE),
                name,
                getattr(self, name),
                f"give an integer from 1 to {MAX_SIZE}",
            )
        _check(
            _is_number(self.adapter_ratio) and 0 < self.adapter_ratio <= 1,
            "adapter_ratio",
            self.adapter_ratio,
            "give a number in (0, 1]",
        )
        _check(self.prompts in PROMPTS, "prompts", self.prompts, f"choose one of {PROMPTS}")
        for name in ("regions", "checkpointing"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "give true or false")
        _check(isinstance(self.loss, LossConfig), "loss", self.loss, "give a LossConfig")

    @classmethod
    def _decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "loss": LossConfig.from_json(data["loss"])}

    @property
    def architecture(self) -> str:
        """What decides the shape and meaning of the parameters, in one line: networks share weights if these agree.

        K, C and all that only training sees are left out.
        """
        patch = "x".join(map(str, self.patch_size))
        widths = "-".join(map(str, (self.stem_width, *self.generator_widths, self.head_width)))
        return (
            f"backbone={self.backbone} patch_size={patch} upsample={self.upsample} num_queries={self.num_queries} "
            f"widths={widths} adapter_ratio={self.adapter_ratio:g} prompts={self.prompts} regions={self.regions}"
        )

    @property
    def sam(self) -> str | None:
        """Which of SAM's published checkpoints a training starts from; None for none."""
        return SAM_OF[self.backbone]

    @property
    def needs_sam(self) -> bool:
        """Whether training starts from one of SAM's published checkpoints."""
        return self.sam is not None


def _int_tuple(option: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(_is_int(v, 1, MAX_SIZE) for v in value):
        raise ConfigError(f"{option} = {value!r} is not allowed: give a list of integers from 1 to {MAX_SIZE}.")
    return tuple(value)


@dataclass(frozen=True)
class Grid:
    """Sizes that follow from the patch and u. All in-plane sizes are (height, width)."""

    patch: tuple[int, int, int]
    """(D, H, W) in voxels; D = 1 for a 2D patch."""
    padded: tuple[int, int]
    """The patch, padded at its lower right so that SAM's input is a multiple of 16, in patch voxels."""
    image: tuple[int, int]
    """SAM's input (S_h, S_w) in pixels: u times ``padded``."""
    tokens: tuple[int, int]
    """The token grid (g_h, g_w)."""
    masks: tuple[int, int]
    """SAM's mask-prompt and mask-output size (4 g_h, 4 g_w)."""

    @classmethod
    def of(cls, config: MaskSAMConfig) -> Grid:
        *depth, height, width = config.patch_size
        step = 16 // config.upsample  # patch voxels a token covers
        rows, columns = -(-height // step), -(-width // step)
        return cls(
            patch=(depth[0] if depth else 1, height, width),
            padded=(rows * step, columns * step),
            image=(rows * 16, columns * 16),
            tokens=(rows, columns),
            masks=(rows * 4, columns * 4),
        )
