"""AutoSAM of Hu et al.: a frozen encoder and one of three heads."""

from ..method import Method, Recipe
from ..modeling.class_decoder import TokensOfClasses
from ..modeling.heads import ConvolutionHead, LinearHead

SOURCE = "Hu et al., AutoSAM: How to efficiently adapt, arXiv 2306.13731"
RECIPE = Recipe(5e-4, optimizer="Adam", exponent=0.0)


METHODS = (
    Method("autosam", "AutoSAMTrainer", SOURCE, RECIPE, ConvolutionHead, sam=("image_encoder.",)),
    Method(
        name="autosam_linear",
        trainer="AutoSAMTrainer_linear",
        source=SOURCE,
        recipe=RECIPE,
        decoder=LinearHead,
        trained=("mask_decoder",),
        sam=("image_encoder.", "mask_decoder.output_upscaling."),
    ),
    Method("autosam_tokens", "AutoSAMTrainer_tokens", SOURCE, RECIPE, TokensOfClasses, trained=("mask_decoder",)),
)
