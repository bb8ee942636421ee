"""AutoSAM of Shaharabany et al.: all of SAM is frozen, and a network that sees the image prompts it."""

from ..method import Method, Recipe
from ..modeling.planned_unet import PromptedDecoder

METHODS = (
    Method(
        name="autosam_prompt",
        trainer="AutoSAMPromptTrainer",
        source="Shaharabany et al., AutoSAM: overloading the prompt encoder, arXiv 2306.06370",
        recipe=Recipe(3e-4, optimizer="Adam", weight_decay=1e-4, exponent=0.0),
        decoder=PromptedDecoder,
        unet=True,
    ),
)
