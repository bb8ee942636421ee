"""What a method of adapting SAM is made of. The files of ``methods/`` declare one or a few each.

Nothing heavy is imported: a config names its method, and what builds it is looked up when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal

MASKSAM = "masksam"
"""The name of this project's own method."""


@dataclass(frozen=True)
class Recipe:
    """How the authors of a method train it."""

    learning_rate: float
    optimizer: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """SGD with Nesterov momentum."""
    weight_decay: float = 0.0
    momentum: float = 0.99
    """Of SGD."""
    eps: float = 1e-8
    """Of AdamW and Adam."""
    gradient_clip: float = 12.0
    """The largest norm of a gradient."""
    warmup_iterations: int = 0
    exponent: float = 0.9
    """Of the polynomial decay of the learning rate; 0 for a constant one."""
    cross_entropy: float = 1.0
    dice: float = 1.0


@dataclass(frozen=True)
class Adaptation:
    """What joins the image encoder; whatever is None is left out."""

    beside: bool = False
    """MaskSAM's adapters, which the backbone declares: after each attention, and beside each MLP."""
    before: Callable[[int], Any] | None = None
    """Makes, from a block's width E, a map of tokens (B, D, h, w, E) whose result is added to them: two for each
    block, before attention and before the MLP."""
    delta: Callable[..., Any] | None = None
    """Makes, from a block's width E and what the blocks share, a map of tokens (..., E) to what is added to their
    queries and to their values, (..., E) each."""
    branch: Callable[..., Any] | None = None
    """Makes, from the backbone, a :class:`~.modeling.bilateral.ConvolutionBranch`."""
    depth_embedding: bool = False
    """Whether tokens learn the index of their slice."""

    @property
    def changes_blocks(self) -> bool:
        return not (self.before is None and self.delta is None and self.branch is None)


@dataclass(frozen=True)
class Method:
    """A method by its parts. All but MaskSAM predict a map for each class, which nnU-Net's loss compares.

    The image rule is :class:`~.modeling.stem.InputStem` for all of them. What prompts SAM belongs to the decoder, and
    output and loss to the network.
    """

    name: str
    """In the config, and in lower case as in the name of its file."""
    trainer: str
    """The name of its trainer's class."""
    source: str
    """Authors and paper."""
    recipe: Recipe | None
    """The authors'; None for MaskSAM, whose presets hold the paper's."""
    decoder: Callable[..., Any] | None = None
    """Makes, from (config, C, K), a module that turns :class:`~.modeling.encoded.Encoded` into maps of logits
    (B, K, d, h, w) of the patch or of strides of it: the first is what is predicted. Its ``unused()`` are the modules
    whose output is never read. MaskSAM has a network instead."""
    adaptation: Adaptation = field(default_factory=Adaptation)
    trained: tuple[str, ...] = ()
    """Parts of SAM that are trained, by their names in the network."""
    sam: tuple[str, ...] = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    """What of SAM the network has, as beginnings of its tensors' names."""
    unet: bool = False
    """Whether it has the U-Net that nnU-Net plans for the patch."""
    weights: Callable[[float], tuple[float, ...]] | None = None
    """The weights of the maps' losses at a share of the training that is done; None halves them as nnU-Net does."""
    short_rate: float = 2e-3
    """The learning rate of a training for minutes: MaskSAM's, or less where that one learns nothing."""
    network: str = "masksam_nnunet.modeling.semantic_sam:SemanticSAM"

    @property
    def adapts_encoder(self) -> bool:
        """Whether a gradient enters the image encoder."""
        inside = self.adaptation.beside or self.adaptation.changes_blocks
        return inside or any(part.startswith("image_encoder") for part in self.trained)


def methods() -> dict[str, Method]:
    """Every method by its name."""
    return resolve_name("masksam_nnunet.methods:METHODS")


def find_method(name: str) -> Method:
    """The method that a config names."""
    return methods()[name]


def build_network(config: Any, *sizes: Any) -> Any:
    """The network of a config; ``sizes`` as of :class:`~.modeling.sam_network.SAMNetwork`."""
    return resolve_name(find_method(config.method).network)(config, *sizes)
