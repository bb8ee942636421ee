"""CUDA tensors without content: what a machine without a GPU can show of a training on one.

FakeTensorMode runs PyTorch's own host code and finds shapes, number formats and devices. An operation on tensors of two
devices fails, and so does whatever needs a value, for which the host would have to wait for the device.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten: Any = torch.ops.aten
_OF_ONE_FORMAT = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward}


class Watch(TorchDispatchMode):
    """Lists the operations for which the host waits for the device, and gives some an answer.

    Products of two number formats fail, as PyTorch's kernels do; its shape functions let them pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in args if isinstance(x, Tensor)]
        packet, on_gpu = func.overloadpacket, [x.device.type == "cuda" for x in tensors]
        if packet in _OF_ONE_FORMAT and len({x.dtype for x in tensors}) > 1:
            raise RuntimeError(f"{func} of {[x.dtype for x in tensors]}")
        if packet is aten.nonzero and on_gpu[0]:
            self.waits.append("nonzero")
            return tensors[0].new_empty((max(1, tensors[0].numel() // 2), tensors[0].ndim), dtype=torch.long)
        if packet is aten._local_scalar_dense and tensors[0].dtype == torch.bool:
            self.waits.append("item")
            return True
        if packet is aten._local_scalar_dense and tensors[0].dtype == torch.long and on_gpu[0]:  # a number of targets
            self.waits.append("number")
            return 3
        if packet is aten.convolution and on_gpu[0] and tensors[0].ndim == 5 and args[-1] > 1:
            assert tensors[0].is_contiguous(), "cuDNN would take a depth-wise convolution of channels last"
        result = func(*args, **kwargs)
        moved = packet is aten._to_copy and on_gpu[0] != (result.device.type == "cuda")
        moved = moved and (result.ndim > 0 or on_gpu[0])  # a number that goes there is an argument of the kernel
        written = packet is aten.copy_ and on_gpu == [False, True]
        if (moved or written) and True not in (*args[2:], kwargs.get("non_blocking")):
            self.waits.append("copy")
        return result


@contextlib.contextmanager
def fake_cuda(patch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[list[str]]:
    """A context in which ``cuda:0`` is a GPU that trains in ``dtype``, and all tensors are without content.

    Gives the list of operations for which the host waits.
    """
    mode, from_numpy = FakeTensorMode(), torch.from_numpy
    patch.setattr(FakeTensorMode, "avoid_device_init", True)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: dtype == torch.bfloat16)
    patch.setattr(torch, "from_numpy", lambda array: mode.from_tensor(from_numpy(array)))
    patch.setattr(FakeTensor, "numpy", lambda self: np.zeros(self.shape, str(self.dtype).split(".")[1]), raising=False)
    patch.setattr(Tensor, "backward", backward)
    patch.setattr(torch._C, "_current_graph_task_id", lambda: 0)  # or checkpoints recompute for each tensor they left
    with mode, Watch() as watch:
        yield watch.waits


def without_content(x: Tensor) -> Tensor:
    """A tensor like it; within :func:`fake_cuda`."""
    mode: Any = active_fake_mode()
    fake: Tensor = mode.from_tensor(x)
    return fake


def move(network: nn.Module) -> None:
    """Replace what a network holds by tensors without content on the GPU; within :func:`fake_cuda`."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = without_content(parameter).detach().to(CUDA)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = without_content(buffer).to(CUDA)


def backward(loss: Tensor) -> None:
    """``loss.backward()``, node by node: PyTorch's own engine asks the driver for the GPU's streams."""
    root: Any = loss.grad_fn
    waiting: dict[Any, int] = defaultdict(int)
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            waiting[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[root][0] = torch.ones_like(loss)
    ready = [root]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, given[0])
            continue
        inputs = [given.get(place) for place in range(len(node._input_metadata))]
        found: Any = node(*inputs) if not hasattr(node, "apply") else node.apply(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        for (following, place), gradient in zip(node.next_functions, found, strict=False):
            if following is None:
                continue
            if gradient is not None:
                gradient = _fitted(gradient, following, place)
                before = gradients[following].get(place)
                gradients[following][place] = gradient if before is None else before + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _fitted(gradient: Tensor, node: Any, place: int) -> Tensor:
    """As the engine does before it gives a gradient to a node."""
    wanted = node.variable if hasattr(node, "variable") else node._input_metadata[place]
    assert gradient.device == torch.device(wanted.device), f"{node}: {gradient.device}, not {wanted.device}"
    gradient = gradient.sum_to_size(wanted.shape) if gradient.shape != wanted.shape else gradient
    return gradient.to(wanted.dtype)


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
