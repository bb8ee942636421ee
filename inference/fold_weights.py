"""What each fold of a model holds for itself; what all folds share is held once, by the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under one name: a state dict repeats those of a module that has several."""
    return {name: t.detach() for name, t in chain(network.named_parameters(), network.named_buffers())}


def own_tensors(network: nn.Module, others: Iterable[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Compare the folds, and keep copies of what differs between them.

    What is compared is what the network holds after loading, so a state dict may lack what the network completes.
    Tensors that are the same in all folds, bit by bit, a frozen encoder's for instance, are not copied.

    Args:
        network: with the first fold's weights, which it also holds afterwards.
        others: the other folds' state dicts; they are loaded one by one and none is kept.

    Returns:
        For each fold, the first included, its tensors that not all folds agree on; empty for a single fold.
    """
    held = network_tensors(network)
    first: dict[str, Tensor] = {}  # the first fold's, where a later one differs
    folds: list[dict[str, Tensor]] = [{}]
    for state in others:
        doubtful = [n for n, t in held.items() if n not in first and not (n in state and same_bits(state[n], t))]
        before = {name: held[name].clone() for name in doubtful}  # all else is what the first fold has
        network.load_state_dict(state)
        del state  # or it would stay while the next one is read
        first |= {name: t for name, t in before.items() if not same_bits(held[name], t)}
        folds.append({name: held[name].clone() for name, t in first.items() if not same_bits(held[name], t)})
    load_own_tensors(network, first)
    return [first | own for own in folds]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit by bit: NaNs too, and zeros with their signs."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a.to(b.device), b)


@torch.no_grad()
def load_own_tensors(network: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Make a network that holds one fold of a model hold another: the one whose :func:`own_tensors` are given."""
    held = network_tensors(network)
    for name, tensor in own.items():
        held[name].copy_(tensor)
