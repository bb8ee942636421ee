"""The safetensors files of a portable model: what folds share once, and the rest for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from masksam_nnunet.errors import PortableError

from ..predictor import same_bits
from .description import SHARED, Description, fold_file

_METADATA = {"format": "pt"}


def second_names(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Names under which all ``states`` repeat a tensor, and the first name of that tensor."""
    return dict(set.intersection(*(set(_second_names(state)) for state in states)))


def _second_names(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    first: dict[object, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride(), tensor.shape
            known = first.setdefault((place, tensor.dtype), name)
            if known != name:
                yield name, known


def split(states: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What all ``states``, of the same keys, agree on bit by bit, and for each what is its own.

    A single state has nothing in common with others.
    """
    head, *others = states
    common = {n: t for n, t in head.items() if others and all(same_bits(other[n], t) for other in others)}
    return common, [{name: t for name, t in state.items() if name not in common} for state in states]


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        PortableError: a type of number that the format does not have.
        OSError: the disk is full, for instance.
    """
    file.touch()
    mode = file.stat().st_mode  # the library would leave a file that others cannot read
    try:
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, str(file), _METADATA)
    except SafetensorError as error:
        if "os error" in str(error):  # how Rust ends what the system said
            raise OSError(str(error)) from error
        raise PortableError(f"cannot write {file}: {error}") from error
    except KeyError as error:
        raise PortableError(f"cannot write {file}: safetensors has no numbers of type {error}") from error
    file.chmod(mode)


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous tensor that is all of its storage, as the format wants it."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return (
        tensor.detach()
        if whole and tensor.is_contiguous()
        else tensor.detach().clone(memory_format=torch.contiguous_format)
    )


def read_states(folder: Path, description: Description, folds: Sequence[str]) -> list[dict[str, Tensor]]:
    """The state dicts of ``folds``; tensors stay in the files until used, and those that are shared are so here too.

    Raises:
        PortableError: a file is damaged, or the files do not fit together.
    """
    shared = _read(folder / SHARED) if SHARED in description.files else {}
    states = []
    for fold in folds:
        file = folder / fold_file(fold)
        own = _read(file)
        if twice := shared.keys() & own.keys():
            raise PortableError(f"{file} holds what {SHARED} holds too: {min(twice)!r:.80}; export the model again")
        state = shared | own
        for name, other in description.same_as.items():
            if name in state or other not in state:
                raise PortableError(f"{file} does not fit same_as: {name!r:.80}, {other!r:.80}; export the model again")
            state[name] = state[other]
        states.append(state)
    return states


def _read(file: Path) -> dict[str, Tensor]:
    with _readable(file), safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    # Its own errors, and PyTorch's for numbers that this version does not have.
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as e:
        raise PortableError(f"{file} cannot be read as safetensors ({e}); fetch the model again") from e
