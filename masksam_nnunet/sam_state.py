"""Read a checkpoint in SAM's own format and fit it to a network of another input size.

Nothing here writes to a module or trusts the file: tensors only, every key accounted for.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import WeightsError

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
"""SAM's three parts, the first component of each of its keys."""

_NESTED = ("model", "state_dict")  # where training scripts put the parameters in a larger dict
_BACKBONES = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}  # (width, blocks)
_REL_POS = re.compile(r"\.attn\.rel_pos_[hw]$")
_SHOWN_KEYS = 4


class Interpolated(NamedTuple):
    """A position parameter that was resized: its key, its shape in the file, its shape in the network."""

    name: str
    source: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of every SAM parameter of a network.

    Attributes:
        loaded: keys copied as they are.
        interpolated: position parameters resized to the network's token grid.
        new: names of the parameters that do not come from SAM.
        file: the checkpoint, "" where it was never a file.
        sha256: its hash.
    """

    loaded: tuple[str, ...]
    interpolated: tuple[Interpolated, ...]
    new: tuple[str, ...] = ()
    file: str = ""
    sha256: str = ""

    def lines(self) -> list[str]:
        """The report for a log, one fact a line."""
        result = [f"SAM weights from {self.file} (SHA-256 {self.sha256})"] if self.file else []
        result.append(f"  loaded unchanged: {_count_by_part(self.loaded)}")
        result.append(f"  interpolated: {len(self.interpolated)} tensors")
        result += [f"    {name}: {_size(source)} -> {_size(target)}" for name, source, target in self.interpolated]
        result.append(f"  new, not from SAM: {_count_by_part(self.new)}")
        return result

    def __str__(self) -> str:
        return "\n".join(self.lines())


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """SAM's parameters from ``path``, on the CPU, memory-mapped where the file allows it.

    The file may hold them at top level, or under "model" or "state_dict". No code in it is ever run.

    Raises:
        WeightsError: unreadable, damaged, a pickle with code in it, or no parameters of SAM.
    """
    content: Any = _load(path)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping):
        raise _not_sam(path, f"it holds a {type(content).__name__}, not a dict of tensors")
    odd = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise _not_sam(path, f"not tensors: {_some(odd)}")
    absent = [f"{part}." for part in PARTS if not any(key.startswith(f"{part}.") for key in content)]
    if absent:
        raise _not_sam(path, f"no key starts with {' or '.join(absent)}; it has {_some(content)}")
    return dict(content)


def identify_backbone(state: Mapping[str, Tensor | torch.Size]) -> str | None:
    """``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, by the encoder's width and number of blocks; None for another one."""
    width, blocks = _encoder_size(state)
    return _BACKBONES.get((width, blocks))


def remap_sam_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], LoadReport]:
    """Fit SAM's parameters to a network whose token grid may differ. Pure: nothing is changed in place.

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
    if _encoder_size(state) != _encoder_size(expected):
        raise WeightsError(
            f"wrong SAM checkpoint: the file holds {_describe_encoder(state)}, the network is "
            f"{_describe_encoder(expected)}; use the checkpoint of the network's backbone or the trainer of the file's"
        )
    faults = [
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
        (
            "of another shape",
            [
                f"{key} ({_size(state[key].shape)}, the network has {_size(shape)})"
                for key, shape in expected.items()
                if key in state and not _fits(key, state[key].shape, shape)
            ],
        ),
    ]
    if any(keys for _, keys in faults):
        found = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults if keys)
        raise WeightsError(f"the checkpoint does not fit the network, nothing was loaded: {found}")

    result: dict[str, Tensor] = {}
    interpolated: list[Interpolated] = []
    for key, shape in expected.items():
        value = state[key]
        if value.shape == shape:
            result[key] = value
        else:
            result[key] = _resize_grid(value, shape) if value.ndim == 4 else _resize_relative(value, shape[0])
            interpolated.append(Interpolated(key, tuple(value.shape), tuple(shape)))
    resized = {entry.name for entry in interpolated}
    return result, LoadReport(tuple(key for key in expected if key not in resized), tuple(interpolated))


def _fits(key: str, source: torch.Size, target: torch.Size) -> bool:
    """Whether ``source`` equals ``target`` or can be interpolated to it."""
    if source == target:
        return True
    if len(source) != len(target):
        return False
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


def _load(path: Path) -> object:
    """``torch.load`` restricted to tensors, its many failures told apart."""
    try:
        # mmap: ViT-H is 2.5 GB, and only PyTorch's zip format can be mapped.
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch remarks on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        code = _code_in_pickle(path)
        if code is not None:
            raise WeightsError(
                f"refused {path}: it is a pickle that would run code when loaded ({code}), and nothing of it was "
                "executed; a SAM checkpoint holds tensors only, get it with: masksam weights vit_b"
            ) from error
        raise _not_sam(path, "PyTorch cannot read it as tensors") from error
    # Damaged files end in whatever the parser meets first.
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"damaged or truncated: {path} ({path.stat().st_size} bytes) cannot be read as a checkpoint "
            f"({_short(error)}); fetch it again with: masksam weights vit_b --force"
        ) from error


def _code_in_pickle(path: Path) -> str | None:
    """The first name a pickle would import that no checkpoint of tensors needs, None if there is none to be found.

    Disassembles without executing.
    """
    with ExitStack() as stack:
        try:
            stream: IO[bytes] = stack.enter_context(path.open("rb"))
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(stream))
                stream = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
            for module, name in _imported_names(stream):
                if module.split(".")[0] not in ("torch", "collections"):
                    return f"{module}.{name}"
        except (ValueError, OSError, StopIteration, zipfile.BadZipFile):
            pass  # no pickle from here on
    return None


def _imported_names(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Module and name of each import, in all the pickles that follow one another (PyTorch's old format)."""
    while True:
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                yield strings[-2], strings[-1]
            elif isinstance(argument, str):
                strings.append(argument)


def _not_sam(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is not a checkpoint in SAM's format: {reason}; get one with: masksam weights vit_b")


def _encoder_size(state: Mapping[str, Tensor | torch.Size]) -> tuple[int, int]:
    """The image encoder's width and number of blocks, 0 where there is none."""
    weight = state.get("image_encoder.patch_embed.proj.weight")
    shape = weight.shape if isinstance(weight, Tensor) else weight
    matches = (re.match(r"image_encoder\.blocks\.(\d+)\.", key) for key in state)
    return (shape[0] if shape else 0), len({match[1] for match in matches if match})


def _describe_encoder(state: Mapping[str, Tensor | torch.Size]) -> str:
    width, blocks = _encoder_size(state)
    return identify_backbone(state) or f"an encoder of width {width} with {blocks} blocks"


def _count_by_part(names: Iterable[str]) -> str:
    counts = Counter(name.split(".")[0] for name in names)
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{sum(counts.values())} tensors" + (f" ({parts})" if parts else "")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).split(". ")[0]
    return text[:120] or type(error).__name__


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _some(keys: Iterable[object]) -> str:
    """The first few of ``keys``."""
    listed = [str(key) for key in keys]
    more = len(listed) - _SHOWN_KEYS
    return ", ".join(listed[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
