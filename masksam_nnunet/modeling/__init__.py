"""The network: one concept a file."""

from .network import MaskSAM, MaskSAMOutput, count_parameters

__all__ = ["MaskSAM", "MaskSAMOutput", "count_parameters"]
