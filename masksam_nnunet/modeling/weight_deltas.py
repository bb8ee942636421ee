"""Low-rank changes of the queries and values of a frozen attention: LoRA and FacT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Trainable, zero_

Maker = Callable[[int, nn.ModuleDict], nn.Module]
"""Makes, from a block's width and what the blocks share, a map of (..., E) to the changes of queries and of values."""


class LoRA(Trainable):
    """Two products of thin matrices (arXiv 2106.09685), the outer ones zero at first, without scaling, as in SAMed."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(2))
        for inner, outer in zip(self.down, self.up, strict=True):
            nn.init.kaiming_uniform_(inner.weight, a=5**0.5)  # type: ignore[arg-type]
            zero_(outer)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        queries, values = (up(down(x)) for down, up in zip(self.down, self.up, strict=True))
        return queries, values


class SharedFactors(Trainable):
    """FacT's U and V, which all blocks of a width share; V is zero at first."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Linear(width, rank, bias=False)
        self.v = nn.Linear(rank, width, bias=False)
        zero_(self.v)


class FacT(Trainable):
    """V C U x with a small C of each block for queries and for values (FacT-TT, arXiv 2212.03145), as in MA-SAM.

    The dropout between them is left out: what is recomputed in the backward pass must not be random.
    """

    def __init__(self, shared: SharedFactors, rank: int) -> None:
        super().__init__()
        self.cores = nn.ModuleList(nn.Linear(rank, rank, bias=False) for _ in range(2))
        self._shared = (shared,)  # in a tuple: its parameters are the encoder's

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (shared,) = self._shared
        inner = shared.u(x)
        queries, values = (shared.v(core(inner)) for core in self.cores)
        return queries, values


def lora(rank: int) -> Maker:
    """LoRA of a rank."""
    return lambda width, _: LoRA(width, rank)


def fact(rank: int) -> Maker:
    """FacT of a rank, with factors of its own for each width of the encoder."""

    def make(width: int, shared: nn.ModuleDict) -> nn.Module:
        name = f"width_{width}"
        if name not in shared:
            shared[name] = SharedFactors(width, rank)
        factors: Any = shared[name]
        return FacT(factors, rank)

    return make


class ChangedProjection(nn.Linear):
    """A frozen projection to queries, keys and values, (..., E) to (..., 3 E), and what is added to it.

    ``groups``: 1 where the three follow each other, else the heads, each of which has its own three.
    """

    def __init__(self, projection: nn.Linear, change: nn.Module, groups: int) -> None:
        super().__init__(projection.in_features, projection.out_features)
        self.weight, self.bias = projection.weight, projection.bias
        self.change, self.groups = change, groups

    def forward(self, x: Tensor) -> Tensor:
        queries, values = (part.unflatten(-1, (self.groups, -1)) for part in self.change(x))
        added = torch.stack([queries, torch.zeros_like(queries), values], dim=-2)  # (..., groups, 3, E / groups)
        return super().forward(x) + added.flatten(-3)


def change_projections(attentions: Iterable[Any], make: Maker, interleaved: bool) -> nn.ModuleDict:
    """Change ``attention.qkv`` of each, in place.

    Args:
        attentions: of the encoder's blocks.
        make: of the changes.
        interleaved: whether each head has its own queries, keys and values.

    Returns:
        What they share, for the encoder to register.
    """
    shared = nn.ModuleDict()
    for attention in attentions:
        groups = attention.num_heads if interleaved else 1
        attention.qkv = ChangedProjection(attention.qkv, make(attention.qkv.in_features, shared), groups)
    return shared
