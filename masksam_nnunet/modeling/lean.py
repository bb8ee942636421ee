"""Lean checkpoints: SAM's frozen weights stay out of them, and come back from SAM's own file when they are loaded.

A network remembers the hash of the file that its SAM came from. A state dict without SAM's weights holds that hash, and
``load_state_dict`` of a ``MaskSAM`` completes it, however the network is wrapped and whoever calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..sam_checkpoint import read_checkpoint, remap_sam_state_dict
from ..sam_weights import find_exact

SHA256 = "sam_file_sha256"
"""The buffer (32,) of uint8 with the hash of SAM's file; zeros where SAM's weights do not come from a file."""
LEAN = "sam_is_left_out"
"""The key that a lean state dict has in addition."""


def is_lean(state: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether ``state`` is a ``MaskSAM``'s, its keys behind ``prefix``, without SAM's frozen weights."""
    return prefix + LEAN in state


def hash_in_hex(buffer: Tensor | None) -> str | None:
    """The hash that the buffer holds; None where SAM's weights come from no file."""
    if buffer is None or buffer.is_meta:
        return None
    digest = bytes(buffer.flatten().to(torch.uint8).tolist())
    return digest.hex() if any(digest) else None


def from_file(sam: str | None, sha256: str | None, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's tensors from the file with this hash, fitted as at the start of a training.

    Args:
        sam: the name of the file's checkpoint.
        sha256: its hash in hex.
        expected: the network's SAM tensors under SAM's own keys.

    Raises:
        WeightsError: SAM's file is missing, or is another one; or the network has no SAM.
    """
    if sam is None or sha256 is None:
        raise WeightsError(
            "the checkpoint is damaged: it leaves out SAM's weights but names no file that holds them; copy it again, "
            "or train this fold again"
        )
    file = read_checkpoint(find_exact(sam, sha256))
    fitted, _ = remap_sam_state_dict(file, {key: value.shape for key, value in expected.items()})
    return {key: value.to(expected[key].dtype) for key, value in fitted.items()}
