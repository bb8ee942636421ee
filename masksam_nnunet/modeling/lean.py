"""Lean checkpoints: SAM's frozen weights stay out of them, and come back from SAM's own file when they are loaded.

A network remembers the hash of the file its SAM came from. A state dict without SAM's weights holds that hash, and
``load_state_dict`` of a ``MaskSAM`` completes it, however the network is wrapped and whoever calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import sam_weights as weights

if TYPE_CHECKING:
    from .network import MaskSAM

SHA256 = "sam_sha256"
"""The buffer (32,) of uint8 with the hash of SAM's file; zeros where SAM's weights do not come from a file."""
FULL = "SAM's frozen weights, left out of a lean checkpoint (masksam export makes a full one)"
"""The empty buffer that lean state dicts lack: nnU-Net's -pretrained_weights names it when it refuses them."""


def prepare(network: MaskSAM) -> None:
    """Give ``network`` the buffers, and the hook that completes lean state dicts."""
    network.register_buffer(SHA256, torch.zeros(32, dtype=torch.uint8))
    if network.config.needs_sam:
        network.register_buffer(FULL, torch.zeros(0))
    network.register_load_state_dict_pre_hook(_complete)


def sam_sha256(network: MaskSAM) -> str | None:
    """The hash in hex of the file that the SAM parts come from; None where they come from none."""
    return _hex(network.get_buffer(SHA256))


def set_sam_sha256(network: MaskSAM, sha256: str) -> None:
    """Remember that the SAM parts were loaded from the file with this hash, given in hex."""
    buffer = network.get_buffer(SHA256)
    buffer.copy_(torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8))


def is_lean(state: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether ``state`` is a ``MaskSAM``'s, its keys behind ``prefix``, without SAM's frozen weights."""
    saved = state.get(prefix + SHA256)
    return saved is not None and _hex(saved) is not None and prefix + FULL not in state


@contextmanager
def lean_state_dicts(network: MaskSAM) -> Iterator[None]:
    """While it lasts, ``network.state_dict()`` leaves out what SAM's file gives back.

    Without a known file nothing is left out: it could not be restored.
    """
    left_out = [FULL, *_frozen(network)] if sam_sha256(network) is not None else []

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
        for name in left_out:
            del state[prefix + name]

    handle = network.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


def _complete(network: MaskSAM, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Add to a lean ``state`` what it lacks, before anything of it is loaded.

    Raises:
        WeightsError: SAM's file is missing, or is another one, or the state belongs to another config.
    """
    if not is_lean(state, prefix):
        return
    _check_config(network, state, prefix)
    sha256 = _hex(state[prefix + SHA256])
    assert sha256 is not None
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    if sam_sha256(network) != sha256:
        tensors |= _read(network, sha256)
    # A network's own tensors, copied onto themselves, cost nothing: so does a second fold.
    for name in _sam_keys(network):
        state.setdefault(prefix + name, tensors[name])
    state[prefix + FULL] = torch.zeros(0)


def _check_config(network: MaskSAM, state: Mapping[str, Any], prefix: str) -> None:
    """The network's own buffers, of which one names its config, must be there."""
    own = {name for name, _ in network.named_buffers(recurse=False)} - {FULL}
    if lacking := [name for name in own if prefix + name not in state]:
        names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        theirs = [name for name in names if "." not in name and name != SHA256]
        raise weights.WeightsError(
            f"the checkpoint belongs to another network: it is for {', '.join(theirs)}; this one is for "
            f"{', '.join(lacking)}. Use the plans and configuration that it was trained with."
        )


def _read(network: MaskSAM, sha256: str) -> dict[str, Tensor]:
    """SAM's tensors by their names in ``network``, from the file with this hash, fitted as a training's start does."""
    sam = network.config.sam
    if sam is None:  # only what was loaded from its file has a hash
        raise weights.WeightsError(
            "the checkpoint is damaged: it says that its SAM comes from a file, and "
            f"{network.config.backbone} has none; copy it again, or train this fold again"
        )
    keys = _sam_keys(network)
    targets = network.state_dict()
    file = weights.read_checkpoint(weights.find_exact(sam, sha256))
    fitted, _ = weights.remap_sam_state_dict(file, {key: targets[name].shape for name, key in keys.items()})
    return {name: fitted[key].to(targets[name].dtype) for name, key in keys.items()}


def _sam_keys(network: MaskSAM) -> dict[str, str]:
    """The names of SAM's tensors in ``network``, and in SAM's checkpoints."""
    names = {module: name for name, module in network.named_modules()}
    return {
        f"{names[module]}.{key}": f"{part}.{key}"
        for part, module in network.sam_parts().items()
        for key in module.state_dict()
    }


def _frozen(network: MaskSAM) -> list[str]:
    """Those of SAM's tensors in ``network`` that are not trained."""
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return [name for name in _sam_keys(network) if name not in trained]


def _hex(buffer: Tensor) -> str | None:
    if buffer.is_meta:
        return None
    digest = bytes(buffer.tolist())
    return digest.hex() if any(digest) else None
