"""HQ-SAM without a user: class tokens, and tokens over finer features that correct their maps."""

from ..method import Method, Recipe
from ..modeling.hq import HQDecoder

METHODS = (
    Method(
        name="hq_sam",
        trainer="HQSAMTrainer",
        source="Ke et al., HQ-SAM, arXiv 2306.01567",
        recipe=Recipe(1e-3, optimizer="Adam", exponent=0.0),
        decoder=HQDecoder,
        trained=("prompt_encoder", "mask_decoder"),
    ),
)
