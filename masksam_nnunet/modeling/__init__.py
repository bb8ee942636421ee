"""The network: one concept a file."""

from .network import MaskSAM, MaskSAMOutput, count_parameters
from .sam_parts import BackboneSpec, register_backbone

__all__ = ["BackboneSpec", "MaskSAM", "MaskSAMOutput", "count_parameters", "register_backbone"]
