"""The network's mathematics as SAM and a first implementation would write it: references for benchmarks and tests.

Attention with its matrix, image embeddings repeated for every query, targets and losses slice by slice. Weights are the
network's own, so that results and gradients can be compared.
"""

from .decoder import plain_decoder, plain_prompt_encoder
from .encoder import plain_encoder
from .loss import PlainCriterion
from .network import plain_parts

__all__ = ["PlainCriterion", "plain_decoder", "plain_encoder", "plain_parts", "plain_prompt_encoder"]
