"""What a training step takes: the real network is run without allocating, and what is alive is added up."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .config import MaskSAMConfig
from .modeling import MaskSAM
from .semantic import semantic_log_probabilities

OPTIMIZER_BYTES = 8  # AdamW keeps two float32 numbers for each trained parameter


@dataclass(frozen=True)
class TrainingCost:
    """Estimated for one GPU."""

    peak_bytes: int
    """Largest memory alive during a step: weights, gradients, optimizer state, activations and temporaries."""
    flops: int
    """Floating-point operations of forward and backward pass."""

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / 2**30

    @property
    def tflop(self) -> float:
        return self.flops / 1e12


# Not in every PyTorch's registry; a derived config must not depend on the version.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 3,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 4,
}


def _attention_flops(*tensors: torch.Tensor) -> int:
    """Two matrix products forward; five backward, where the gradient comes before query, key and value."""
    query, key = tensors[-3:-1]
    product = 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
    return product * (2 if len(tensors) == 3 else 5)


class _Meter(TorchDispatchMode):
    """Adds up operations, and the storages that are alive, whose peak it knows.

    FlopCounterMode beside it would keep the graph, and so memory, alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.flops += _attention_flops(*args[: _ATTENTION[packet]])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def training_cost(config: MaskSAMConfig, in_channels: int, num_classes: int, batch_size: int) -> TrainingCost:
    """Peak memory and operations of a training step in bfloat16, without a GPU and without allocating.

    Fake CPU tensors take the fused attention path and respect autocast, as a GPU does; the meta device does neither.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Meter() as meter:
        network = MaskSAM(config, in_channels, num_classes).train()
        for tensor in (*network.parameters(), *network.buffers()):
            meter.add(tensor)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        x = torch.zeros(batch_size, in_channels, *config.patch_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(x)
        semantic = semantic_log_probabilities(output.class_logits, output.mask_logits, config.regions)
        loss = semantic.square().mean() + sum(part.float().square().mean() for part in output)
        loss.backward()
    return TrainingCost(meter.peak + OPTIMIZER_BYTES * trained, meter.flops)
