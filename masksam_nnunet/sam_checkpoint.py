"""Read a checkpoint in SAM's own format, and fit it to a network of another input size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones import BACKBONES
from .checkpoints import load_tensors
from .errors import WeightsError

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
"""SAM's three parts, the first component of each of its keys."""

_NESTED = ("model", "state_dict")  # where training scripts put the parameters in a larger dict
_RENAMED = (
    (r"^module\.", ""),  # DistributedDataParallel's
    # TinyViT: LiteMedSAM, MobileSAM
    (r"^(image_encoder\..+)\.c\.", r"\1.conv."),
    (r"^image_encoder\.patch_embed\.seq\.0\.", "image_encoder.stem.0."),
    (r"^image_encoder\.patch_embed\.seq\.2\.", "image_encoder.stem.1."),
    (r"^image_encoder\.layers\.0\.blocks\.", "image_encoder.convolutions."),
    (r"^image_encoder\.layers\.(\d)\.downsample\.", r"image_encoder.merges.\1."),
    *((rf"^image_encoder\.layers\.{i}\.blocks\.", f"image_encoder.stages.{i - 1}.") for i in (1, 2, 3)),
)
"""Keys of the known formats, and what they are in this project's networks."""
_LEFT_OUT = (
    (
        "SAM-HQ's mask decoder",
        r"mask_decoder\.(hf_token|hf_mlp|compress_vit_feat|embedding_encoder|embedding_maskfeature)\.",
    ),
    ("SAM-Med2D's adapters", r"image_encoder\.blocks\.\d+\.Adapter\."),
    ("MobileSAM's classifier", r"image_encoder\.(norm_head|head)\."),
)
"""What the known formats hold beside SAM's own parts, by their keys' beginnings."""
_REL_POS = re.compile(r"\.attn\.rel_pos_[hw]$")


class SamFile(NamedTuple):
    """A checkpoint's content."""

    tensors: dict[str, Tensor]
    """SAM's parameters and buffers under this project's names."""
    left_out: dict[str, int]
    """How many tensors were left out, by what they belong to."""


def read_checkpoint(path: Path) -> SamFile:
    """SAM's parameters from ``path``, on the CPU, memory-mapped where the file allows it.

    The file may hold them at top level, or under "model" or "state_dict", in the formats of SAM, MedSAM, SAM-HQ,
    SAM-Med2D, LiteMedSAM and MobileSAM. No code in it is ever run.

    Raises:
        WeightsError: unreadable, damaged, a pickle with code in it, or no parameters of SAM.
    """
    content: Any = load_tensors(path, WeightsError)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping):
        reason = f"it holds a {type(content).__name__}, not a dict of tensors"
    elif odd := [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        reason = f"not tensors: {_some(odd)}"
    else:
        tensors = {_our_name(key): value for key, value in content.items()}
        if {key.split(".")[0] for key in tensors}.issuperset(PARTS):
            extra = {key: owner for owner, pattern in _LEFT_OUT for key in tensors if re.match(pattern, key)}
            return SamFile({key: x for key, x in tensors.items() if key not in extra}, Counter(extra.values()))
        reason = f"its keys must start with {', '.join(PARTS)}; it has {_some(content)}"
    raise WeightsError(f"{path} is not a checkpoint in SAM's format: {reason}; get one with: masksam weights vit_b")


def _our_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def remap_sam_state_dict(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Fit SAM's parameters to a network whose token grid may differ. Nothing is changed in place.

    Position parameters of another size are interpolated in float32: ``image_encoder.pos_embed`` (1, g_h, g_w, E)
    bicubically, antialiased where the grid shrinks (plain bicubic would skip rows of it), and relative positions
    (2 g - 1, C) linearly, as segment-anything's ``get_rel_pos`` does on the fly. All else must agree exactly.

    Args:
        state: the tensors of a checkpoint under this project's names, which are SAM's own for its ViTs.
        expected: the shapes of the network's SAM parameters and buffers.

    Returns:
        Tensors under the keys of ``expected``, in its shapes.

    Raises:
        WeightsError: another backbone, or keys that are missing, unexpected or of another shape.
    """
    found, wanted = _encoder({key: value.shape for key, value in state.items()}), _encoder(expected)
    if found != wanted:
        raise WeightsError(
            f"wrong SAM checkpoint: the file holds {found}, the network is {wanted}; use the checkpoint of the "
            "network's backbone or the trainer of the file's"
        )
    common = [key for key in expected if key in state]
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in common if not _fits(key, state[key].shape, expected[key])],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise WeightsError(f"the checkpoint does not fit the network, nothing was loaded: {listed}")

    return {key: _resized(state[key], shape) for key, shape in expected.items()}


def _fits(key: str, source: torch.Size, target: torch.Size) -> bool:
    """Whether ``source`` equals ``target`` or can be interpolated to it."""
    if source == target:
        return True
    if key == "image_encoder.pos_embed":
        return len(source) == 4 and (source[0], source[3]) == (target[0], target[3])
    return bool(_REL_POS.search(key)) and len(source) == 2 and source[1] == target[1]


def _resized(value: Tensor, shape: torch.Size) -> Tensor:
    """Position parameters at the size of ``shape``; others as they are."""
    if value.shape == shape:
        return value
    if value.ndim == 2:  # relative positions
        resized = F.interpolate(value.float().t()[None], size=shape[0], mode="linear")[0].t()
    else:
        shrinks = shape[1] < value.shape[1] or shape[2] < value.shape[2]
        grid = value.float().permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=tuple(shape[1:3]), mode="bicubic", align_corners=False, antialias=shrinks)
        resized = grid.permute(0, 2, 3, 1)
    return resized.to(value.dtype).contiguous()


def _encoder(state: Mapping[str, torch.Size]) -> str:
    """The image encoder by its name, or by its width and number of blocks (0 where there is none)."""
    width = state.get("image_encoder.neck.0.weight", (0, 0))[1]
    blocks = len({key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")})
    stem = state.get("image_encoder.stem.0.conv.weight", (0,))[-1]  # side of the kernel of TinyViT's first layer
    stride = 4 if stem == 1 else 16
    sizes = width, blocks, stride
    names = [b.name for b in BACKBONES.values() if b.checkpoint and (b.width, b.depth, b.stride) == sizes]
    return names[0] if names else f"an encoder of width {width} with {blocks} blocks and stride {stride}"


def _some(keys: Iterable[object]) -> str:
    """The first few of ``keys``."""
    listed = [str(key) for key in keys]
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
