"""A SAM small enough for tests, in place of ViT-B, and its file in SAM's own format."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from configs import tiny_config

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.sam_files import CHECKPOINTS
from masksam_nnunet.sam_weights import released

SMALL_SAM = replace(
    BACKBONES["vit_b"],
    width=32,
    depth=4,
    heads=2,
    global_blocks=(0, 1, 2, 3),
    prompt_width=16,
    decoder_mlp=32,
    decoder_heads=2,
    mask_channels=4,
)


def expect_release(patch: pytest.MonkeyPatch, backbone: str, content: bytes) -> None:
    """Let ``content`` be the released checkpoint."""
    checkpoint = replace(released(backbone), sha256=hashlib.sha256(content).hexdigest())
    patch.setitem(CHECKPOINTS, checkpoint.name, checkpoint)


def install_small_sam(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let ``vit_b`` be a small SAM, and its released file, for 4×4 tokens, lie in the cache, which is ``folder``."""
    patch.setitem(BACKBONES, "vit_b", SMALL_SAM)
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256"):
        patch.delenv(name, raising=False)
    patch.setenv("MASKSAM_CACHE", str(folder))
    file = write_small_sam(folder / released("vit_b").file_name)
    expect_release(patch, "vit_b", file.read_bytes())
    return file


def write_small_sam(file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A small SAM of random weights, none of them zero, in SAM's format. ``vit_b`` must be the small SAM."""
    network = MaskSAM(tiny_config(backbone="vit_b", patch_size=(1, 64, 64)), 1, 3)
    state = {
        name: (value + 0.1 * torch.randn_like(value)).detach().to(dtype)
        for name, value in network.sam_tensors().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file
