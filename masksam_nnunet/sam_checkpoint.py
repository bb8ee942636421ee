"""Read a checkpoint in SAM's own format, fit it to a network of another input size, and load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones import BACKBONES
from .checkpoints import load_tensors
from .errors import WeightsError
from .sam_weights import verify

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
"""SAM's three parts, the first component of each of its keys."""

_NESTED = ("model", "state_dict")  # where training scripts put the parameters in a larger dict
_REL_POS = re.compile(r"\.attn\.rel_pos_[hw]$")


class Interpolated(NamedTuple):
    """A position parameter that was resized: its key, its shape in the file, its shape in the network."""

    name: str
    source: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of every SAM parameter of a network."""

    loaded: tuple[str, ...]
    """Keys copied as they are."""
    interpolated: tuple[Interpolated, ...]
    """Position parameters resized to the network's token grid."""
    new: tuple[str, ...] = ()
    """Parameters that do not come from SAM."""
    file: str = ""
    sha256: str = ""

    def lines(self) -> list[str]:
        """The report for a log, one fact a line."""
        return [
            f"SAM weights from {self.file} (SHA-256 {self.sha256})",
            f"  loaded unchanged: {_count_by_part(self.loaded)}",
            f"  interpolated: {len(self.interpolated)} tensors",
            *(f"    {name}: {'x'.join(map(str, a))} -> {'x'.join(map(str, b))}" for name, a, b in self.interpolated),
            f"  new, not from SAM: {_count_by_part(self.new)}",
        ]


def load_sam(targets: Mapping[str, Tensor], backbone: str, path: Path, new: Sequence[str] = ()) -> LoadReport:
    """Verify ``path``, read it, fit it and copy it into ``targets``: all of it, or nothing at all.

    Args:
        targets: a network's SAM parameters and buffers under SAM's own keys.
        backbone: the name of a backbone with a released checkpoint.
        path: the checkpoint.
        new: names of the network's other parameters, for the report.

    Raises:
        WeightsError: the file is missing, damaged, untrusted or does not fit.
    """
    sha256 = verify(path, backbone)
    state, report = remap_sam_state_dict(read_checkpoint(path), {key: value.shape for key, value in targets.items()})
    with torch.no_grad():
        for key, value in state.items():
            targets[key].copy_(value)
    return replace(report, new=tuple(new), file=str(path), sha256=sha256)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """SAM's parameters from ``path``, on the CPU, memory-mapped where the file allows it.

    The file may hold them at top level, or under "model" or "state_dict". No code in it is ever run.

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
    elif {key.split(".")[0] for key in content}.issuperset(PARTS):
        return dict(content)
    else:
        reason = f"its keys must start with {', '.join(PARTS)}; it has {_some(content)}"
    raise WeightsError(f"{path} is not a checkpoint in SAM's format: {reason}; get one with: masksam weights vit_b")


def remap_sam_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], LoadReport]:
    """Fit SAM's parameters to a network whose token grid may differ. Nothing is changed in place.

    Position parameters of another size are interpolated in float32: ``image_encoder.pos_embed`` (1, g_h, g_w, E)
    bicubically, antialiased where the grid shrinks (plain bicubic would skip rows of it), and relative positions
    (2 g - 1, C) linearly, as segment-anything's ``get_rel_pos`` does on the fly. All else must agree exactly.

    Args:
        state: a checkpoint under SAM's own keys.
        expected: the shapes of the network's SAM parameters under SAM's own keys.

    Returns:
        Tensors under the keys of ``expected``, in its shapes, and the report.

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

    result: dict[str, Tensor] = {}
    interpolated: list[Interpolated] = []
    for key, shape in expected.items():
        result[key] = value = state[key]
        if value.shape != shape:
            result[key] = _resize_grid(value, shape) if value.ndim == 4 else _resize_relative(value, shape[0])
            interpolated.append(Interpolated(key, tuple(value.shape), tuple(shape)))
    loaded = tuple(key for key, shape in expected.items() if state[key].shape == shape)
    return result, LoadReport(loaded, tuple(interpolated))


def _fits(key: str, source: torch.Size, target: torch.Size) -> bool:
    """Whether ``source`` equals ``target`` or can be interpolated to it."""
    if source == target:
        return True
    if key == "image_encoder.pos_embed":
        return len(source) == 4 and (source[0], source[3]) == (target[0], target[3])
    return bool(_REL_POS.search(key)) and len(source) == 2 and source[1] == target[1]


def _resize_grid(value: Tensor, shape: torch.Size) -> Tensor:
    """(1, g_h, g_w, E) to the grid of ``shape``."""
    shrinks = shape[1] < value.shape[1] or shape[2] < value.shape[2]
    grid = value.float().permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(shape[1:3]), mode="bicubic", align_corners=False, antialias=shrinks)
    return grid.permute(0, 2, 3, 1).to(value.dtype).contiguous()


def _resize_relative(value: Tensor, length: int) -> Tensor:
    """(L, C) to (length, C)."""
    resized = F.interpolate(value.float().t().unsqueeze(0), size=length, mode="linear")
    return resized.squeeze(0).t().to(value.dtype).contiguous()


def _encoder(state: Mapping[str, torch.Size]) -> str:
    """The image encoder by its name, or by its width and number of blocks (0 where there is none)."""
    width = next(iter(state.get("image_encoder.patch_embed.proj.weight", ())), 0)
    blocks = len({key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")})
    names = [b.name for b in BACKBONES.values() if b.checkpoint and (b.width, b.depth) == (width, blocks)]
    return names[0] if names else f"an encoder of width {width} with {blocks} blocks"


def _count_by_part(names: Iterable[str]) -> str:
    counts = Counter(name.split(".")[0] for name in names)
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{sum(counts.values())} tensors" + (f" ({parts})" if parts else "")


def _some(keys: Iterable[object]) -> str:
    """The first few of ``keys``."""
    listed = [str(key) for key in keys]
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
