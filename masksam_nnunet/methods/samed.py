"""SAMed: low-rank changes of the encoder's queries and values, and a decoder with a token for each class."""

from ..method import Adaptation, Method, Recipe
from ..modeling.class_decoder import ClassTokenDecoder
from ..modeling.weight_deltas import lora

METHODS = (
    Method(
        name="samed",
        trainer="SAMedTrainer",
        source="Zhang and Liu, SAMed, arXiv 2304.13785",
        recipe=Recipe(5e-3, weight_decay=0.1, warmup_iterations=250, cross_entropy=0.2, dice=0.8),
        decoder=ClassTokenDecoder,
        adaptation=Adaptation(delta=lora(4)),
        trained=("prompt_encoder", "mask_decoder"),
    ),
)
