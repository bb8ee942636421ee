"""Configs for tests."""

from __future__ import annotations

from typing import Any

from torch import nn

from masksam_nnunet.config import LightConfig, LossConfig, MaskSAMConfig, UNetConfig

TINY_WIDTHS: dict[str, Any] = {"stem_width": 8, "head_width": 8, "generator": LightConfig((16, 8, 8))}
PAPER: dict[str, Any] = {"matching": "slice", "num_queries": 4}
"""The paper's form: free queries, assigned to the targets of a slice."""
UNET = UNetConfig((4, 8, 8, 8), ((1, 3, 3), *[(3, 3, 3)] * 3), ((1, 1, 1), *[(1, 2, 2)] * 3), (1, 1, 1, 1))
"""In-plane strides of 1, 2, 4 and 8."""


def tiny_config(**changes: Any) -> MaskSAMConfig:
    """A tiny config that builds and runs in a blink: one query for each class."""
    settings: dict[str, Any] = {"backbone": "tiny", "patch_size": (3, 32, 48), "resolution": 1, **TINY_WIDTHS}
    return MaskSAMConfig(**{**settings, **changes})


def loss_config(**changes: Any) -> LossConfig:
    """Without the terms that are nnU-Net's own loss."""
    return LossConfig(**{"semantic": 0.0, "generator": 0.0, **changes})


def with_equal_shares(network: nn.Module) -> nn.Module:
    """A network whose maps start as equal shares: of random weights, one that starts as background finds nothing."""
    decoder: Any = network.get_submodule("prompt_generator.decoder")
    for head in getattr(decoder, "seg_layers", ()):
        nn.init.zeros_(head.bias)
    return network
