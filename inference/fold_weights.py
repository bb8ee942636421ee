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
    first: dict[str, Tensor] = {}
    folds: list[dict[str, Tensor]] = [{}]
    for state in others:
        first = first or _bytes_in_one_block(held)
        network.load_state_dict(state)
        del state  # or it would stay while the next one is read
        folds.append({name: t.clone() for name, t in held.items() if not torch.equal(_bytes(t), first[name])})
    varying = [name for name in held if any(name in own for own in folds)]
    folds[0] = {name: first[name].clone().view(held[name].dtype).view(held[name].shape) for name in varying}
    load_own_tensors(network, folds[0])
    return [folds[0] | own for own in folds]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _bytes_in_one_block(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors' bytes. One large block goes back to the system when freed; many small ones may not."""
    block = torch.cat([_bytes(tensor) for tensor in tensors.values()])
    return dict(zip(tensors, block.split([tensor.nbytes for tensor in tensors.values()]), strict=True))


@torch.no_grad()
def load_own_tensors(network: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Make a network that holds one fold of a model hold another: the one whose :func:`own_tensors` are given."""
    held = network_tensors(network)
    for name, tensor in own.items():
        held[name].copy_(tensor)
