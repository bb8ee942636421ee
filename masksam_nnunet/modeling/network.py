"""The network, assembled from its parts."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Grid, MaskSAMConfig
from ..errors import WeightsError
from ..sam_checkpoint import PARTS, read_checkpoint, remap_sam_state_dict
from ..sam_weights import find_exact, verify
from ..semantic import semantic_log_probabilities, union_logits
from .blocks import Trainable
from .compute import recomputed
from .mask_decoder import AdaptedMaskDecoder
from .mask_head import MaskHead
from .prompt_encoder import AdaptedPromptEncoder
from .prompt_generator import PromptGenerator, Prompts
from .stem import InputStem

ARCHITECTURE = "architecture"
"""The buffer that tells checkpoints of different configs apart: the config's line as text, (512,) of uint8."""
SHA256 = "sam_file_sha256"
"""The buffer (32,) of uint8 with the hash of SAM's file; zeros where SAM's weights do not come from a file."""
LEAN = "sam_is_left_out"
"""The key of a state dict without SAM's frozen weights, which ``load_state_dict`` takes from SAM's own file."""
FOREIGN = -1e4
"""The logit of a class that a query does not belong to; finite also in float16."""
LARGEST = 50.0
"""Bound of what is predicted: nnU-Net adds up windows, weighted up to 10, in float16."""
TOKENS_PER_CHUNK = 2**15
"""Image tokens over all masks that are decoded at once: 8 masks of a 64x64 grid."""


def queries_at_once(config: MaskSAMConfig, queries: int, tokens: int, training: bool) -> int:
    """How many of N queries are decoded together; ``tokens``: of the image, over all slices of the batch.

    The embedding of a mask prompt is large, so many are decoded a few at a time, and again in the backward pass. Only a
    network that is trained throughout decodes all at once, which is faster.
    """
    if training and not (config.checkpointing or config.sam):
        return queries
    return min(queries, max(1, TOKENS_PER_CHUNK // tokens))


class MaskSAMOutput(NamedTuple):
    """What the losses see."""

    class_logits: Tensor
    """(B, D, N, K + 1), "no object" last."""
    mask_logits: Tensor
    """(B, D, N, H, W)"""
    aux_mask_logits: Tensor
    """(B, D, N, 4 g_h, 4 g_w): the prompt generator's masks, over the padded patch."""
    aux_boxes: Tensor
    """(B, D, N, 4): x0 y0 x1 y1 in [0, 1] of the padded patch, as given to SAM."""
    class_maps: tuple[Tensor, ...] = ()
    """Where queries belong to classes: the generator's own semantic output, the finest first, logits (B, K, d, h, w)
    for nnU-Net's loss."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> MaskSAMOutput:
        """What queries give, each tensor changed; without the class maps."""
        queries = self.class_logits, self.mask_logits, self.aux_mask_logits, self.aux_boxes
        classes, masks, aux_masks, boxes = map(change, queries)
        return MaskSAMOutput(classes, masks, aux_masks, boxes)


class MaskSAM(nn.Module):
    """MaskSAM (arXiv 2403.14103): SAM as a semantic segmenter of volumes, without a user.

    In training mode ``forward`` returns a :class:`MaskSAMOutput`; in evaluation mode nnU-Net's semantic output,
    log-probabilities (B, K, D, H, W), or (B, K, H, W) for a 2D patch.

    Args:
        config: all but the numbers of channels and classes.
        in_channels: C, with a cascade's one-hot channels.
        num_classes: K, nnU-Net's ``num_segmentation_heads``.
        image_channels: how many of the C are image channels, the first ones; all if not given.
    """

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
        self.grid = grid = Grid.of(config)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.sam_is_loaded = False
        """Whether the SAM parts hold weights from a file: SAM's own, or a checkpoint of this network."""
        backbone, depth = config.encoder, grid.patch[0]

        self.stem = InputStem(config, in_channels, image_channels)
        self.image_encoder = backbone.make_encoder(config)
        self.num_queries = config.queries(num_classes)
        self.prompt_generator = PromptGenerator(config, in_channels, self.num_queries)
        self.prompt_encoder = AdaptedPromptEncoder(config)
        self.mask_decoder = AdaptedMaskDecoder(config, depth, num_classes)
        widths = self.prompt_generator.decoder.widths[:1] + ((config.stem_width,) if self.stem.features else ())
        on_grid = int(config.generator.kind == "light")  # the generator's own; the stem's are of the patch
        self.mask_head = MaskHead(self.num_queries, widths, on_grid, config.head_width, grid, config.anchored)
        self.register_buffer(ARCHITECTURE, _as_bytes(config.architecture))
        self.register_buffer(SHA256, torch.zeros(32, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_mark_loaded)
        self._freeze()

    def _freeze(self) -> None:
        """Train what is new beside a frozen SAM; else all whose output is read."""
        if self.config.sam:
            self.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, Trainable):
                    module.requires_grad_(True)
        if self.config.forward_only:
            self.image_encoder.requires_grad_(False)
        for module in (
            *self.mask_decoder.unused(),
            *self.prompt_encoder.unused(),
            *self.prompt_generator.decoder.unused(),
        ):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> MaskSAMOutput | Tensor:
        if self.training:
            return self.parts(x)
        semantic = self._semantic(x)
        # nnU-Net predicts in float16, which is closer to float32 than bfloat16. What was trained in that may not fit.
        kind = x.device.type
        in_float16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if in_float16 and not semantic.isfinite().all():
            with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):  # the cache holds float16
                semantic = self._semantic(x)
        return semantic.clamp(-LARGEST, LARGEST)

    def _semantic(self, x: Tensor) -> Tensor:
        output, config = self.parts(x), self.config
        semantic = semantic_log_probabilities(output.class_logits, output.mask_logits, config.regions, config.anchored)
        return semantic[:, :, 0] if x.ndim == 4 else semantic

    def parts(self, x: Tensor) -> MaskSAMOutput:
        """The outputs that losses see, in training and evaluation mode, for (B, C, D, H, W) or (B, C, H, W)."""
        saving = self.config.checkpointing and self.training
        volume = self._as_volume(x)
        images, stem = self.stem(volume)  # (B, D, 3, S_h, S_w), (B, w, D, H, W) or None
        levels, neck = self.image_encoder(images)
        prompts: Prompts = recomputed(saving, self.prompt_generator, volume, levels, neck)
        masks, classes = self.decode(neck, prompts)
        features = (prompts.features,) if stem is None else (prompts.features, stem)
        masks = recomputed(saving, self.mask_head, masks, prompts.start, *features)  # (B, N, D, H, W)
        if self.config.anchored:
            classes = self._of_all_classes(classes)
        return MaskSAMOutput(
            class_logits=classes.transpose(1, 2),
            mask_logits=masks.transpose(1, 2),
            aux_mask_logits=prompts.mask_logits.transpose(1, 2),
            aux_boxes=prompts.boxes.transpose(1, 2),
            class_maps=tuple(map(self._class_map, prompts.maps)),
        )

    def _of_all_classes(self, own: Tensor) -> Tensor:
        """Class logits (B, N, D, K + 1), from those of each query's own class against "no object", (B, N, D, 1)."""
        owner = torch.arange(self.num_queries, device=own.device) // self.config.num_queries
        foreign = F.one_hot(owner, self.num_classes)[:, None] == 0  # (N, 1, K)
        logits = own.expand(-1, -1, -1, self.num_classes).masked_fill(foreign, FOREIGN)
        return F.pad(logits, (0, 1))

    def _class_map(self, queries: Tensor) -> Tensor:
        """Logits of classes, (B, K, ...), from those of their queries."""
        if self.config.regions or self.num_queries == self.num_classes:
            return union_logits(queries, self.num_classes, dim=1)
        return queries.unflatten(1, (self.num_classes, -1)).logsumexp(2)

    def decode(self, neck: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Mask logits (B, N, D, 4 g_h, 4 g_w) and class logits (B, N, D, K + 1). Queries are independent."""
        pe = self.prompt_encoder.dense_pe()  # (D, P, g_h, g_w)

        def decode(boxes: Tensor, masks: Tensor, class_tokens: Tensor) -> tuple[Tensor, Tensor]:
            sparse, dense = self.prompt_encoder(boxes, masks)
            decoded: tuple[Tensor, Tensor] = self.mask_decoder(neck, pe, sparse, dense, class_tokens)
            return decoded

        given = prompts.boxes, prompts.mask_logits, prompts.class_tokens
        size = queries_at_once(self.config, self.num_queries, neck.numel() // neck.shape[2], self.training)
        if size == self.num_queries:
            return recomputed(self.training and self.config.checkpointing, decode, *given)
        chunks = zip(*(x.split(size, dim=1) for x in given), strict=True)
        masks, classes = zip(*(recomputed(self.training, decode, *chunk) for chunk in chunks), strict=True)
        return torch.cat(masks, dim=1), torch.cat(classes, dim=1)

    def _as_volume(self, x: Tensor) -> Tensor:
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
        file, left_out = read_checkpoint(path)
        fitted = remap_sam_state_dict(file, {name: x.shape for name, x in targets.items()})
        with torch.no_grad():
            for name, value in fitted.items():
                targets[name].copy_(value)
        self.get_buffer(SHA256).copy_(torch.tensor(list(bytes.fromhex(sha256))))
        self.sam_is_loaded = True
        resized = [name for name, x in targets.items() if x.shape != file[name].shape]
        new = [name for name, _ in self.named_parameters() if name not in targets]
        return [
            f"SAM weights from {path} (SHA-256 {sha256})",
            f"  loaded unchanged: {_count_by_part(targets.keys() - resized)}",
            f"  interpolated to this token grid: {_count_by_part(resized)}",
            f"  new, not from SAM: {_count_by_part(new)}",
            *(f"  in the file and left out: {count} tensors of {owner}" for owner, count in left_out.items()),
        ]

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


def check_sam_file(path: Path, backbone: str) -> None:
    """Raise WeightsError unless the checkpoint at ``path`` has all that a network with ``backbone`` needs of SAM."""
    with torch.device("meta"):
        network = MaskSAM(MaskSAMConfig(backbone, (1, 64, 64), 1), 1, 1)
    remap_sam_state_dict(read_checkpoint(path).tensors, {name: x.shape for name, x in network.sam_tensors().items()})


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
    assert isinstance(network, MaskSAM)
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
            file = read_checkpoint(find_exact(sam, sha256)).tensors
            fitted = remap_sam_state_dict(file, {name: x.shape for name, x in tensors.items()})
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
