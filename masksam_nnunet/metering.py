"""Operations and memory of a computation, found out without doing it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

MANY = 20_000  # operations to remember: those of some ten estimates

_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Missing in some versions of PyTorch; a derived config must not depend on the version.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 3, _ATTENTION_BACKWARD: 4}


def _attention_flops(*tensors: Tensor) -> int:
    """Two matrix products forward; five backward, where the gradient comes before query, key and value."""
    query, key = tensors[-3:-1]
    product = 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
    return product * (2 if len(tensors) == 3 else 5)


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Memory:
    """A storage, which counts as long as a tensor refers to it."""

    def __init__(self, meter: Meter, size: int) -> None:
        self.meter, self.size = meter, size
        meter.now += size
        meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.size


class _Hollow(Tensor):
    """A tensor without content, which autograd, autocast and attention take for one on the CPU."""

    layout_: _Layout
    memory: _Memory

    @staticmethod
    def make(memory: _Memory, layout: _Layout) -> _Hollow:
        shape, strides, dtype = layout
        cpu = torch.device("cpu")
        hollow: _Hollow = Tensor._make_wrapper_subclass(_Hollow, shape, strides=strides, dtype=dtype, device=cpu)
        hollow.memory, hollow.layout_ = memory, layout
        return hollow

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a tensor without content, outside of its Meter")


class Meter(TorchDispatchMode):
    """Context in which tensors have no content; counts operations, and bytes of living storages with their peak.

    Much quicker than PyTorch's FakeTensorMode with its FlopCounterMode: what an operation gives is looked up by the
    layouts of its arguments.
    """

    _recipes: ClassVar[dict[Any, _Recipe]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's guard against compiling a mode, which nobody does here, takes a tenth of the time."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0

    def __enter__(self) -> Meter:
        if len(self._recipes) > MANY:
            self._recipes.clear()
        self._collects = gc.isenabled()
        gc.disable()  # it would free memory at any time, and looks at all these small objects in vain
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._collects:
            gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors: list[Tensor] = []
        key = func, _key(args, tensors), _key(kwargs, tensors)
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = _find_recipe(func, args, kwargs or {})
        self.flops += recipe.flops
        fresh = [_Memory(self, size) for size in recipe.sizes]
        self.peak = max(self.peak, self.now + recipe.workspace)
        # torch.tensor makes one with content, which is small.
        tensors = [x if isinstance(x, _Hollow) else _Hollow.make(_Memory(self, 0), _layout(x)) for x in tensors]
        outputs = [output(tensors, fresh) for output in recipe.outputs]
        return outputs[0] if recipe.structure is None else recipe.structure.unflatten(outputs)


def _key(x: Any, tensors: list[Tensor]) -> Any:
    """What decides the layouts that an operation gives, as a key; collects the tensors among its arguments."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _layout(x)
    if isinstance(x, list | tuple):
        return tuple([_key(y, tensors) for y in x])
    if isinstance(x, dict):
        return tuple([(name, _key(y, tensors)) for name, y in x.items()])
    return (type(x), x) if isinstance(x, int | float) else x  # 1, 1.0 and True are equal


def _layout(x: Tensor) -> _Layout:
    return x.layout_ if isinstance(x, _Hollow) else _Layout(x.shape, x.stride(), x.dtype)


class _Recipe(NamedTuple):
    """What an operation gives for arguments of certain layouts."""

    flops: int
    sizes: list[int]
    """Bytes of each new storage."""
    outputs: list[Callable[[list[Any], list[_Memory]], Any]]
    """Each from the tensors among the arguments and the new storages."""
    structure: Any
    """Of several outputs."""
    workspace: int
    """Bytes that are needed meanwhile."""


def _find_recipe(func: Any, args: Any, kwargs: dict[str, Any]) -> _Recipe:
    """Let the meta device tell."""
    inputs: list[Tensor] = []

    def to_meta(x: Any) -> Any:
        if isinstance(x, Tensor):
            shape, strides, dtype = _layout(x)
            inputs.append(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
            return inputs[-1]
        return torch.device("meta") if isinstance(x, torch.device) else x

    args, kwargs = tree_map(to_meta, args), tree_map(to_meta, kwargs)
    if not inputs and any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    result = func(*args, **kwargs)
    packet, flops = func._overloadpacket, 0
    if packet in _ATTENTION:
        flops = _attention_flops(*args[: _ATTENTION[packet]])
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=result)

    old = {x.untyped_storage()._cdata: number for number, x in enumerate(inputs)}
    new: dict[int, int] = {}
    sizes: list[int] = []

    def output(x: Any) -> Callable[[list[Any], list[_Memory]], Any]:
        if not isinstance(x, Tensor):
            return lambda tensors, fresh: x
        for number, given in enumerate(inputs):
            if given is x:  # changed in place
                return lambda tensors, fresh: tensors[number]
        storage, layout = x.untyped_storage(), _layout(x)
        if storage._cdata in old:  # a view
            source = old[storage._cdata]
            return lambda tensors, fresh: _Hollow.make(tensors[source].memory, layout)
        if storage._cdata not in new:
            new[storage._cdata] = len(sizes)
            sizes.append(storage.nbytes())
        place = new[storage._cdata]
        return lambda tensors, fresh: _Hollow.make(fresh[place], layout)

    leaves, structure = tree_flatten(result)
    outputs = [output(leaf) for leaf in leaves]
    workspace = 0
    if packet is _ATTENTION_BACKWARD and args[1].dtype != torch.float32:
        workspace = 4 * args[1].numel()  # a GPU sums up the query's gradient in float32
    return _Recipe(flops, sizes, outputs, None if isinstance(result, Tensor) else structure, workspace)
