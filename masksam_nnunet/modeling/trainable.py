"""What is new beside SAM, and so trained: said by structure, not by the names of parameters.

Idea: torchtune's adapters declare their own parameters (torchtune/modules/peft).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Trainable(nn.Module):
    """A module that SAM does not have. All parameters in it and below it are trained."""


class DepthEmbedding(Trainable):
    """A learned embedding of the slice index, zero at first. Shape (D, C), added to a channels-last tensor."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, channels))

    def forward(self) -> Tensor:
        return self.weight  # (D, C)


def freeze_all_but_trainable(network: nn.Module) -> None:
    """Leave gradients only to the parameters of :class:`Trainable` modules."""
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Trainable):
            module.requires_grad_(True)


def freeze(modules: Iterable[nn.Module]) -> None:
    """Take gradients from modules whose output is never used."""
    for module in modules:
        module.requires_grad_(False)


def zero_(layer: nn.Linear | nn.Conv3d) -> None:
    """Zero a layer, so that the residual it ends adds nothing at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
