"""A GPU without a GPU: tensors on cuda that hold nothing, and a backward pass over them.

PyTorch's engine asks the driver for streams before it starts, so the graph is walked in Python here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TASKS = itertools.count(1)


class _Waits(TorchDispatchMode):
    """Notes what waits for the GPU: copies to the host, and results whose size is not known before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = [{x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in (args, result)]
        copied = "cuda" in devices[0] and "cpu" in devices[1] and not (kwargs or {}).get("non_blocking")
        if copied or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return result


@contextmanager
def fake_cuda(dtype: torch.dtype) -> Iterator[list[str]]:
    """In this context, new tensors are on a GPU with bfloat16, or without; gives what has waited for it."""
    with ExitStack() as stack:
        # torch.cuda.is_available stays false: fake tensors would start CUDA.
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda **_: dtype == torch.bfloat16))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(torch.device("cuda", 0))
        yield stack.enter_context(_Waits()).found


def backward(loss: Tensor) -> None:
    """``loss.backward()``, node by node, in the engine's order: the latest first, when all who read it are done."""
    task = next(_TASKS)
    with mock.patch("torch._C._current_graph_task_id", lambda: task):  # checkpoints are computed once a task
        _walk(loss)


def _walk(loss: Tensor) -> None:
    root: Any = loss.grad_fn
    waiting: dict[Any, int] = defaultdict(int)
    found, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                waiting[following] += 1
                if following not in found:
                    found.add(following)
                    stack.append(following)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[root][0] = torch.ones_like(loss)
    ready = [root]
    while ready:
        node = max(ready, key=lambda node: node._sequence_nr())
        ready.remove(node)
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            leaf = node.variable
            for gradient in given.values():
                assert gradient.device == leaf.device and gradient.dtype == leaf.dtype, (gradient, leaf)
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        inputs = [given.get(index) for index in range(len(node._input_metadata))]
        outputs: Any = (node.apply if hasattr(node, "apply") else node)(*inputs) if given else ()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for index, (following, number) in enumerate(node.next_functions):
            if following is None:
                continue
            gradient = outputs[index] if index < len(outputs) else None
            if gradient is not None:
                wanted = following._input_metadata[number]
                assert gradient.device == wanted.device, (node, gradient.device, following, wanted.device)
                # As the engine does: the gradient of what was broadcast is a sum.
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                slot = gradients[following]
                slot[number] = slot[number] + gradient if number in slot else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
