"""A SAM small enough for tests, in place of ViT-B, and its file in SAM's own format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from configs import tiny_config

from masksam_nnunet import sam_weights as weights
from masksam_nnunet.config import Grid
from masksam_nnunet.modeling.backbones.registry import (
    SPECS,
    BackboneSpec,
    build_image_encoder,
    build_mask_decoder,
    build_prompt_encoder,
)

SMALL_SAM = BackboneSpec(
    32, 4, 2, (0, 1, 2, 3), prompt_width=16, decoder_mlp=32, decoder_heads=2, mask_channels=4, sam="vit_b"
)


def expect_release(patch: pytest.MonkeyPatch, backbone: str, content: bytes) -> None:
    """Let ``content`` be the released checkpoint."""
    release = weights.SAM_RELEASES[backbone]
    changed = weights.SamRelease(release.file_name, release.url, hashlib.sha256(content).hexdigest())
    patch.setitem(weights.SAM_RELEASES, backbone, changed)


def install_small_sam(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let ``vit_b`` be a small SAM, and its released file, for 4×4 tokens, lie in the cache, which is ``folder``."""
    patch.setitem(SPECS, "vit_b", SMALL_SAM)
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256"):
        patch.delenv(name, raising=False)
    patch.setenv("MASKSAM_CACHE", str(folder))
    file = write_small_sam(folder / weights.SAM_RELEASES["vit_b"].file_name)
    expect_release(patch, "vit_b", file.read_bytes())
    return file


def write_small_sam(file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A small SAM of random weights, none of them zero, in SAM's format."""
    grid = Grid.of(tiny_config(patch_size=(1, 64, 64)))
    parts = {
        "image_encoder": build_image_encoder(SMALL_SAM, grid),
        "prompt_encoder": build_prompt_encoder(SMALL_SAM, grid),
        "mask_decoder": build_mask_decoder(SMALL_SAM),
    }
    state = {
        f"{part}.{key}": (value + 0.1 * torch.randn_like(value)).to(dtype)
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file
