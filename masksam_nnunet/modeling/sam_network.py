"""What every adaptation of SAM shares: its frozen weights, what of it is trained, and prediction in nnU-Net's form."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from ..errors import WeightsError
from ..method import find_method
from ..sam_checkpoint import PARTS, SamFile, read_checkpoint, remap_sam_state_dict
from ..sam_weights import find_exact, verify
from .blocks import Trainable

ARCHITECTURE = "architecture"
"""The buffer that tells checkpoints of different configs apart: the config's line as text, (512,) of uint8."""
SHA256 = "sam_file_sha256"
"""The buffer (32,) of uint8 with the hash of SAM's file; zeros where SAM's weights do not come from a file."""
LEAN = "sam_is_left_out"
"""The key of a state dict without SAM's frozen weights, which ``load_state_dict`` takes from SAM's own file."""
LARGEST = 50.0
"""Bound of what is predicted: nnU-Net adds up windows, weighted up to 10, in float16."""


class SAMNetwork(nn.Module, ABC):
    """A network around SAM's parts, which have SAM's names in it.

    In training mode ``forward`` returns what the method's loss sees; in evaluation mode nnU-Net's semantic output,
    (B, K, D, H, W), or (B, K, H, W) for a 2D patch.

    Args:
        config: all but the numbers of channels and classes.
        in_channels: C, with a cascade's one-hot channels.
        num_classes: K, nnU-Net's ``num_segmentation_heads``.
        image_channels: how many of the C are image channels, the first ones; all if not given.
    """

    image_encoder: Any

    def __init__(
        self, config: MaskSAMConfig, in_channels: int, num_classes: int, image_channels: int | None = None
    ) -> None:
        super().__init__()
        image_channels = in_channels if image_channels is None else image_channels
        if num_classes < 1 or not 1 <= image_channels <= in_channels:
            raise ValueError(
                f"in_channels = {in_channels}, image_channels = {image_channels}, num_classes = {num_classes}: give at "
                "least one of each, and no more image channels than channels"
            )
        self.config = config
        self.method = find_method(config.method)
        self.grid = Grid.of(config)
        self.in_channels, self.image_channels, self.num_classes = in_channels, image_channels, num_classes
        self.sam_is_loaded = False
        """Whether the SAM parts hold weights from a file: SAM's own, or a checkpoint of this network."""
        self.register_buffer(ARCHITECTURE, _as_bytes(config.architecture))
        self.register_buffer(SHA256, torch.zeros(32, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_mark_loaded)

    def freeze(self) -> None:
        """Train what is new beside a frozen SAM, and what the method trains of it; else all whose output is read."""
        if self.config.sam:
            self.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, Trainable):
                    module.requires_grad_(True)
            for name in self.method.trained:
                self.get_submodule(name).requires_grad_(True)
        if self.config.forward_only:
            self.image_encoder.requires_grad_(False)
        for module in self.unused():
            module.requires_grad_(False)

    @abstractmethod
    def unused(self) -> Iterable[nn.Module]:
        """Modules whose output is never read."""

    @abstractmethod
    def outputs(self, x: Tensor) -> Any:
        """What losses see, in training and evaluation mode, for (B, C, D, H, W) or (B, C, H, W)."""

    @abstractmethod
    def semantic(self, output: Any) -> Tensor:
        """nnU-Net's semantic output of what :meth:`outputs` gave, (B, K, D, H, W)."""

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.outputs(x)
        semantic = self._predicted(x)
        # nnU-Net predicts in float16, which is closer to float32 than bfloat16. What was trained in that may not fit.
        kind = x.device.type
        in_float16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if in_float16 and not semantic.isfinite().all():
            with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):  # the cache holds float16
                semantic = self._predicted(x)
        return semantic.clamp(-LARGEST, LARGEST)

    def _predicted(self, x: Tensor) -> Tensor:
        semantic = self.semantic(self.outputs(x))
        return semantic[:, :, 0] if x.ndim == 4 else semantic

    def as_volume(self, x: Tensor) -> Tensor:
        """The input as (B, C, D, H, W).

        Raises:
            ValueError: it has another shape than this network is built for.
        """
        expected = (self.in_channels, *self.config.patch_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: this network is built for (batch, {', '.join(map(str, expected))}). "
                "Use the plans, configuration and channels that it was trained with."
            )
        return x[:, :, None] if x.ndim == 4 else x

    # ---- SAM's weights -------------------------------------------------------------------------------------------

    def sam_tensors(self) -> dict[str, Tensor]:
        """SAM's own parameters and buffers, under the names that ``read_checkpoint`` gives them."""
        if not self.config.sam:
            return {}
        new = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, Trainable))
        tensors = self.state_dict(keep_vars=True).items()
        return {name: x for name, x in tensors if name.split(".")[0] in PARTS and not name.startswith(new)}

    def load_sam(self, path: Path) -> list[str]:
        """Load SAM's weights from a published checkpoint, or a fine-tuned one in such a format: all of it, or nothing.

        Returns:
            What became of SAM's and this network's parameters, for a log.

        Raises:
            WeightsError: the file is missing, damaged, untrusted or does not fit.
        """
        targets = self.sam_tensors()
        sha256 = verify(path, str(self.config.sam))
        file = read_checkpoint(path)
        fitted = self._fitted(file)
        with torch.no_grad():
            for name, value in fitted.items():
                targets[name].copy_(value)
        self.get_buffer(SHA256).copy_(torch.tensor(list(bytes.fromhex(sha256))))
        self.sam_is_loaded = True
        resized = [name for name, x in targets.items() if x.shape != file.tensors[name].shape]
        new = [name for name, _ in self.named_parameters() if name not in targets]
        return [
            f"SAM weights from {path} (SHA-256 {sha256})",
            f"  loaded unchanged: {_count_by_part(targets.keys() - resized)}",
            f"  interpolated to this token grid: {_count_by_part(resized)}",
            f"  new, not from SAM: {_count_by_part(new)}",
            *(f"  in the file and left out: {count} tensors of {owner}" for owner, count in file.left_out.items()),
        ]

    def _fitted(self, file: SamFile) -> dict[str, Tensor]:
        """What the network has of SAM, fitted to its sizes."""
        shapes = {name: x.shape for name, x in self.sam_tensors().items()}
        return remap_sam_state_dict({k: x for k, x in file.tensors.items() if k.startswith(self.method.sam)}, shapes)

    def store_frozen(self, dtype: torch.dtype) -> int:
        """Store the frozen linear maps of SAM's encoder in ``dtype``, as autocast rounds them in every step.

        Returns:
            The bytes that this saves.
        """
        saved = 0
        for module in self.image_encoder.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                rounded = module.weight.data.to(dtype)
                saved += module.weight.nbytes - rounded.nbytes
                module.weight.data = rounded
        return saved

    def sam_sha256(self) -> str | None:
        """The hash in hex of the file that the SAM parts come from; None where they come from none."""
        return hash_in_hex(self.get_buffer(SHA256))

    @contextlib.contextmanager
    def lean_state_dicts(self) -> Iterator[None]:
        """Let ``state_dict()`` leave out SAM's frozen tensors inside this context.

        Loading restores them from SAM's file. If they come from no file, nothing is left out.
        """
        if self.sam_sha256() is None:
            yield
            return
        left_out = [name for name, tensor in self.sam_tensors().items() if not tensor.requires_grad]

        def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
            for name in left_out:
                del state[prefix + name]
            state[prefix + LEAN] = torch.ones(1, dtype=torch.uint8)

        handle = self.register_state_dict_post_hook(leave_out)
        try:
            yield
        finally:
            handle.remove()


def count_parameters(network: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) for each part of the network, and for the whole, which comes last."""
    for name, module in (*network.named_children(), ("total", network)):
        parameters = list(module.parameters())
        yield name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _before_loading(network: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state dict of another config, and complete a lean one, before anything of it is loaded.

    Raises:
        WeightsError: another config, or SAM's file for a lean state dict is missing or another one.
    """
    assert isinstance(network, SAMNetwork)
    ours, saved = network.config.architecture, state.get(prefix + ARCHITECTURE)
    if saved is not None and saved.tolist() != _as_bytes(ours).tolist():
        theirs = bytes(saved.flatten().to(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")
        raise WeightsError(
            f"the checkpoint belongs to another network: it is for {theirs}; this one is for {ours}. Use the plans and "
            "configuration that it was trained with."
        )
    if prefix + LEAN in state:
        sam, sha256 = network.config.sam, hash_in_hex(state.get(prefix + SHA256))
        if sam is None or sha256 is None:
            raise WeightsError(
                "the checkpoint is damaged: it leaves out SAM's weights but names no file that holds them; copy it "
                "again, or train this fold again"
            )
        tensors = network.sam_tensors()
        if network.sam_sha256() != sha256:
            fitted = network._fitted(read_checkpoint(find_exact(sam, sha256)))
            tensors = {name: x.to(tensors[name].dtype) for name, x in fitted.items()}
        # A network's own tensors, copied onto themselves, cost nothing: so does a second fold.
        for name, tensor in tensors.items():
            state.setdefault(prefix + name, tensor)
        del state[prefix + LEAN]


def hash_in_hex(buffer: Tensor | None) -> str | None:
    """What the buffer :data:`SHA256` says; None for zeros or no buffer."""
    if buffer is None or buffer.is_meta:
        return None
    digest = bytes(buffer.flatten().to(torch.uint8).tolist())
    return digest.hex() if any(digest) else None


def _mark_loaded(network: nn.Module, _: object) -> None:
    network.sam_is_loaded = True  # type: ignore[assignment]


def _as_bytes(architecture: str) -> Tensor:
    text = architecture.encode()
    if len(text) > 512:  # its hash stands for what does not fit
        text = text[:448] + hashlib.sha256(text).hexdigest().encode()
    return torch.tensor(list(text.ljust(512, b"\0")), dtype=torch.uint8)


def _count_by_part(names: Iterable[str]) -> str:
    counts = Counter(name.split(".")[0] for name in names)
    return f"{counts.total()} tensors ({', '.join(f'{part} {count}' for part, count in sorted(counts.items()))})"
