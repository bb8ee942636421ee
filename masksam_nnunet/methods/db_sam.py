"""DB-SAM: channel attention after each of the encoder's levels, and a branch of convolutions that exchanges with it."""

from ..method import Adaptation, Method, Recipe
from ..modeling.bilateral import ConvolutionBranch
from ..modeling.class_decoder import ClassTokenDecoder

METHODS = (
    Method(
        name="db_sam",
        trainer="DBSAMTrainer",
        source="Qin et al., DB-SAM, MICCAI 2024",
        recipe=Recipe(1e-4, weight_decay=0.01, warmup_iterations=250),
        decoder=ClassTokenDecoder,
        adaptation=Adaptation(branch=ConvolutionBranch),
        trained=("image_encoder.neck", "prompt_encoder", "mask_decoder"),
        short_rate=5e-4,
    ),
)
