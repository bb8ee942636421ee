"""Operations and memory of a computation, found out without doing it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from .modeling import compute

MANY = 20_000  # operations to remember: those of some ten estimates

# Missing in some versions of PyTorch; a derived config must not depend on the version.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 3,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 4,
}


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


class _Group:
    """The layouts of several tensors, and the storages that they share; None in the place of no tensor."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        storages: dict[_Memory, int] = {}
        self.layouts: list[tuple[int, _Layout] | None] = []
        for x in tensors:
            assert x is None or isinstance(x, _Hollow)
            number = None if x is None else storages.setdefault(x.memory, len(storages))
            self.layouts.append(None if x is None or number is None else (number, x.layout_))
        self.sizes = [memory.size for memory in storages]

    def make(self, meter: Meter) -> list[Tensor | None]:
        fresh = [_Memory(meter, size) for size in self.sizes]
        return [None if x is None else _Hollow.make(fresh[x[0]], x[1]) for x in self.layouts]


class Meter(TorchDispatchMode):
    """Context in which tensors have no content; counts operations, and bytes of living storages with their peak.

    Much quicker than PyTorch's FakeTensorMode with its FlopCounterMode: what an operation gives is looked up by the
    layouts of its arguments, and of the calls of :func:`~.modeling.compute.recomputed` that are alike one is run.
    """

    _recipes: ClassVar[dict[Any, _Recipe]] = {}
    _records: ClassVar[dict[Any, _Record]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._signatures: dict[nn.Module, int] = {}

    def __enter__(self) -> Meter:
        if len(self._recipes) > MANY:
            self._recipes.clear()
            self._records.clear()
        self._run, compute.run = compute.run, self._call
        self._collects = gc.isenabled()
        gc.disable()  # it would free memory at any time, and looks at all these small objects in vain
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        compute.run = self._run
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
        # torch.tensor makes one with content, which is small.
        tensors = [x if isinstance(x, _Hollow) else _Hollow.make(_Memory(self, 0), _layout(x)) for x in tensors]
        outputs = [output(tensors, fresh) for output in recipe.outputs]
        return outputs[0] if recipe.structure is None else recipe.structure.unflatten(outputs)

    # ---- Calls that are alike ------------------------------------------------------------------------------------

    def _call(self, active: bool, function: Any, *inputs: Any) -> Any:
        """As :func:`~.modeling.compute.recomputed`."""
        if isinstance(function, partial):
            function, inputs = function.func, (*function.args, *inputs)
        if getattr(function, "__closure__", None):
            return self._run(active, function, *inputs)
        leaves, structure = tree_flatten(inputs)
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        modules = [x for x in (owner, *leaves) if isinstance(x, nn.Module)]
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = (
            *(active, None if function is owner else getattr(function, "__func__", function), str(structure)),
            tuple(_key(None if isinstance(x, nn.Module) else x, []) for x in leaves),
            tuple(x.requires_grad for x in tensors),
            tuple(map(self._signature, modules)),
            *(torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        )
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        record = self._records.get(key)
        if record is None:
            compute.run = self._run
            record = self._records[key] = self._measure(active, function, leaves, structure, parameters)
            compute.run = self._call
        used = [p for p, is_used in zip(parameters, record.used, strict=False) if is_used]
        return record.structure.unflatten(_Replay.apply(self, record, *tensors, *used))

    def _measure(
        self,
        active: bool,
        function: Callable[..., Any],
        leaves: list[Any],
        structure: Any,
        parameters: list[nn.Parameter],
    ) -> _Record:
        """Run a call and its backward pass alone; neither counts."""
        peak, flops = self.peak, self.flops
        torch.clear_autocast_cache()  # copies of weights
        before, self.flops = self.now, 0
        outputs, output_structure, edges, memories, forward_peak = self._run_alone(active, function, leaves, structure)
        torch.clear_autocast_cache()
        group, alive = _Group(outputs), [memory() for memory in memories]
        record = _Record(
            forward_peak=forward_peak,
            forward_flops=self.flops,
            kept=self.now - before - sum(group.sizes) - sum(memory.size for memory in set(alive) if memory),
            keeps=[memory is not None for memory in alive],
            outputs=group,
            differentiable=[x.requires_grad for x in outputs],
            structure=output_structure,
        )
        del alive
        ends = [x for x in outputs if x.requires_grad]
        if ends:
            before, self.peak, self.flops = self.now, self.now, 0
            wanted = [*filter(None, edges), *parameters]
            with torch.autocast("cpu", enabled=False):
                found = iter(torch.autograd.grad(_Start.apply(*ends), wanted, allow_unused=True))
            torch.clear_autocast_cache()
            of_inputs = [edge and next(found) for edge in edges]
            of_parameters = list(found)
            record.gradients = _Group([*of_inputs, *(x for x in of_parameters if x is not None)])
            record.used = [x is not None for x in of_parameters]
            record.backward_peak = self.peak - before - sum(x.nbytes for x in ends)
            record.backward_flops = self.flops
        self.peak, self.flops = peak, flops
        return record

    def _run_alone(self, active: bool, function: Callable[..., Any], leaves: list[Any], structure: Any) -> Any:
        """Run a call with inputs that nothing else refers to.

        Returns:
            Outputs, their structure, where the gradient of each input arrives, the memory of each input as a weak
            reference, and the peak beside inputs.
        """
        root = torch.zeros((), requires_grad=True)
        owned = {memory: _Memory(self, memory.size) for memory in {x.memory for x in leaves if isinstance(x, _Hollow)}}
        given = list(leaves)
        for number, x in enumerate(leaves):
            if isinstance(x, _Hollow):
                given[number] = _Hollow.make(owned[x.memory], x.layout_)
                if x.requires_grad:
                    given[number] = _Copy.apply(root, given[number])
        tensors = [x for x in given if isinstance(x, _Hollow)]
        edges = [get_gradient_edge(x) if x.requires_grad else None for x in tensors]
        memories = [weakref.ref(x.memory) for x in tensors]
        start = self.peak = self.now
        outputs, output_structure = tree_flatten(self._run(active, function, *structure.unflatten(given)))
        return outputs, output_structure, edges, memories, self.peak - start

    def _signature(self, module: nn.Module) -> int:
        """Equal for modules that compute alike."""
        if module not in self._signatures:
            tensors = (*module._parameters.items(), *module._buffers.items())
            content = (
                type(module),
                *((name, _value(value)) for name, value in vars(module).items() if not name.startswith("_")),
                *((name, None if x is None else (_layout(x), x.requires_grad)) for name, x in tensors),
                *((name, self._signature(child)) for name, child in module.named_children()),
            )
            self._signatures[module] = hash(content)
        return self._signatures[module]


def _value(x: Any) -> Any:
    return x if isinstance(x, Hashable) else repr(x)


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
    return _Recipe(flops, sizes, outputs, None if isinstance(result, Tensor) else structure)


@dataclass
class _Record:
    """What a call took: operations, and bytes beside those that were alive before."""

    forward_peak: int
    forward_flops: int
    kept: int
    """For the backward pass, beside inputs and outputs."""
    keeps: list[bool]
    """Which inputs are kept too."""
    outputs: _Group
    differentiable: list[bool]
    structure: Any
    gradients: _Group | None = None
    """Of inputs and used parameters."""
    used: list[bool] = field(default_factory=list)
    """Which parameters have a gradient."""
    backward_peak: int = 0
    """Beside the gradients of the outputs."""
    backward_flops: int = 0


class _Copy(torch.autograd.Function):
    """A tensor that has a gradient and is no leaf: a leaf would be kept to receive it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, x: _Hollow) -> Tensor:
        return _Hollow.make(x.memory, x.layout_)


class _Start(torch.autograd.Function):
    """A number with new gradients for what it was made of, which nothing else refers to."""

    @staticmethod
    def forward(ctx: Any, *ends: Tensor) -> Tensor:
        ctx.layouts = [_layout(x) for x in ends]
        return ends[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(torch.empty(layout.shape, dtype=layout.dtype) for layout in ctx.layouts)


class _Replay(torch.autograd.Function):
    """Takes what a record says."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, record: _Record, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.meter, ctx.record = meter, record
        ctx.save_for_backward(*(x for x, keep in zip(inputs, record.keeps, strict=False) if keep))
        ctx.set_materialize_grads(False)
        meter.flops += record.forward_flops
        meter.peak = max(meter.peak, meter.now + record.forward_peak)
        ctx.kept = _Memory(meter, record.kept)
        outputs = record.outputs.make(meter)
        ctx.mark_non_differentiable(*(x for x, yes in zip(outputs, record.differentiable, strict=True) if not yes))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        meter, record = ctx.meter, ctx.record
        meter.flops += record.backward_flops
        meter.peak = max(meter.peak, meter.now + record.backward_peak)
        ctx.kept = None  # before there are gradients
        return None, None, *record.gradients.make(meter)
