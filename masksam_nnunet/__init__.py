"""MaskSAM for nnU-Net: SAM with auto-prompts and mask classification, as a trainer plugin for nnU-Net v2."""

__version__ = "0.1.0"
