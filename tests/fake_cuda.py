"""A GPU without a GPU: tensors on cuda that hold nothing, and a backward pass over them.

PyTorch's engine asks the driver for streams before it starts, so the graph is walked in Python here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_TASKS = itertools.count(1)


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
