"""The networks: one concept a file."""

from .network import MaskSAM, MaskSAMOutput
from .sam_network import SAMNetwork, count_parameters

__all__ = ["MaskSAM", "MaskSAMOutput", "SAMNetwork", "count_parameters"]
