"""MaskSAM's plans: planning, presets, checks of raw data, and converters."""
