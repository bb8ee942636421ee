"""The network: one concept a file."""

from .backbones.registry import BackboneSpec, register_backbone
from .network import MaskSAM, MaskSAMOutput, count_parameters

__all__ = ["BackboneSpec", "MaskSAM", "MaskSAMOutput", "count_parameters", "register_backbone"]
