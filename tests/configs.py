"""Configs for tests."""

from __future__ import annotations

from masksam_nnunet.config import LossConfig, MaskSAMConfig

TINY_WIDTHS = {"stem_width": 8, "generator_widths": (16, 8, 8), "head_width": 8}


def tiny_config(**changes: object) -> MaskSAMConfig:
    """A tiny config that builds and runs in a blink."""
    settings: dict[str, object] = {
        "backbone": "tiny",
        "patch_size": (3, 32, 48),
        "resolution": 1,
        "num_queries": 4,
        **TINY_WIDTHS,
        **changes,
    }
    return MaskSAMConfig(**settings)  # type: ignore[arg-type]


def loss_config(**changes: object) -> LossConfig:
    return LossConfig(**{"semantic": 0.0, **changes})  # type: ignore[arg-type]
