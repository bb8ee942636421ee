"""H-SAM: SAMed's changes of the encoder, and a second decoder that the maps of the first lead."""

from ..method import Adaptation, Method, Recipe
from ..modeling.hierarchical import HierarchicalDecoder
from ..modeling.weight_deltas import lora

EPOCHS = 300
"""The authors', over which the weight moves to the second stage."""


def _weights(progress: float) -> tuple[float, ...]:
    """Of the mean, which is only predicted, the second stage and the first."""
    second: float = 0.6 ** (0.99 ** (EPOCHS * progress))
    return 0.0, second, 1 - second


METHODS = (
    Method(
        name="h_sam",
        trainer="HSAMTrainer",
        source="Cheng et al., H-SAM, arXiv 2403.18271",
        recipe=Recipe(2.6e-3, weight_decay=0.1, warmup_iterations=250, cross_entropy=0.1, dice=0.9),
        decoder=HierarchicalDecoder,
        adaptation=Adaptation(delta=lora(5)),
        trained=("prompt_encoder", "mask_decoder"),
        weights=_weights,
    ),
)
