"""MA-SAM: FacT, two adapters a block that convolve along the slices, and a decoder up to the patch's size."""

from functools import partial

from ..method import Adaptation, Method, Recipe
from ..modeling.adapters import DepthConvAdapter
from ..modeling.class_decoder import ClassTokenDecoder
from ..modeling.weight_deltas import fact

METHODS = (
    Method(
        name="ma_sam",
        trainer="MASAMTrainer",
        source="Chen et al., MA-SAM, arXiv 2309.08842",
        recipe=Recipe(8e-4, weight_decay=0.1, warmup_iterations=250, exponent=7, cross_entropy=0.2, dice=0.8),
        decoder=partial(ClassTokenDecoder, to_patch_size=True),
        adaptation=Adaptation(before=DepthConvAdapter, delta=fact(32)),
        trained=("prompt_encoder", "mask_decoder"),
        short_rate=5e-4,
    ),
)
