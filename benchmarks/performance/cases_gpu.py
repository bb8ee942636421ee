"""What only a GPU can show: kernels of attention, ``torch.compile``, and steps and predictions of real sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import blobs, forward_and_back, training
from cases_nnunet import nnunet_loss, prediction, stock, unet_step
from measure import Builder, Case
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.attention import extended, fused_attention, relative_scores, relative_vectors

ACDC_SPACING = (10.0, 1.5, 1.5)
EFFICIENT, FLASH, PLAIN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
CUDNN = SDPBackend.CUDNN_ATTENTION


@dataclass(frozen=True)
class Sizes:
    """Those of the cases below."""

    vit_b: tuple[int, ...] = (4, 256, 256)
    """A patch, at r = 4: SAM sees 1024 pixels."""
    acdc: tuple[int, ...] = (10, 256, 224)
    """The patch of nnU-Net's plan for the ACDC subset."""
    case: tuple[int, ...] = (10, 256, 216)
    """A volume of ACDC."""
    tokens: int = 64
    images: int = 4
    windows: int = 400
    """Windows of 14x14 tokens."""


SMALL = Sizes((2, 32, 32), (4, 64, 64), (4, 70, 60), 8, 1, 4)
"""Of the same cases on a CPU, where they show only that they run."""


def _as_taken(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    return fused_attention(qkv, rows, columns, scale).transpose(1, 2)


def _folded(pad_values: bool, kernel: SDPBackend, qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    q, k, v = extended(qkv, rows, columns, scale)
    with sdpa_kernel([kernel, PLAIN] if qkv.device.type == "cpu" else kernel):
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if pad_values else v
        return F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., : v.shape[-1]]


_compiled_flex = torch.compile(flex_attention, dynamic=False)


def _flex(qkv: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    to_rows, to_columns = relative_scores(q, rows, columns)
    width = len(columns)

    def with_positions(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + to_rows[b, head, query, key // width] + to_columns[b, head, query, key % width]

    return _compiled_flex(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=with_positions, scale=scale)


def _kernel(compute: Callable[..., Tensor] | None, images: int, grid: int) -> Builder:
    """Attention of ViT-B's blocks; None is segment-anything's own."""

    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        layer = Attention(768, num_heads=12, use_rel_pos=True, input_size=(grid, grid)).requires_grad_(False).to(device)
        nn.init.normal_(layer.rel_pos_h, std=0.1)
        nn.init.normal_(layer.rel_pos_w, std=0.1)
        x = torch.randn(images, grid, grid, 768, device=device, requires_grad=True)

        def forward() -> list[Tensor]:
            if compute is None:
                return [layer(x)]
            qkv = layer.qkv(x).reshape(images, grid * grid, 3, 12, 64)
            out = compute(qkv, *relative_vectors(layer, grid, grid, qkv.dtype), layer.scale)
            return [layer.proj(out.transpose(1, 2).reshape(images, grid, grid, 768))]

        return forward

    return forward_and_back(make)


def _tiny_vit_windows(form: str, windows: int) -> Builder:
    """Attention of TinyViT's second stage: windows of 14x14 tokens with a bias for each pair."""

    def make(device: torch.device) -> Callable[[], Iterable[Tensor]]:
        q, k, v = (torch.randn(windows, 5, 196, 32, device=device, requires_grad=True) for _ in range(3))
        bias = torch.randn(5, 196, 196, device=device)

        def forward() -> list[Tensor]:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            a, b, c = (x.to(dtype) for x in (q, k, v))
            if form == "FlexAttention":
                return [_compiled_flex(a, b, c, score_mod=lambda score, _, head, i, j: score + bias[head, i, j])]
            mask = bias.to(dtype)[None]
            if form.startswith("aligned"):  # keys of a multiple of 8: PyTorch else copies the bias for every call
                mask = F.pad(mask, (0, 4), value=float("-inf"))
                b, c = F.pad(b, (0, 0, 0, 4)), F.pad(c, (0, 0, 0, 4))
            kernel = {"plain": PLAIN, "aligned, memory-efficient": EFFICIENT, "aligned, cuDNN": CUDNN}.get(form)
            if kernel is not None and device.type == "cpu":
                kernel = PLAIN
            with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
                return [F.scaled_dot_product_attention(a, b, c, attn_mask=mask)]

        return forward

    return forward_and_back(make)


def _step(config: MaskSAMConfig, classes: int, compiled: bool = False, by_dice: bool = False) -> Builder:
    """A training step of two patches."""
    depth, *plane = config.patch_size
    truth = blobs(2, depth, max(plane), classes)[..., : plane[0], : plane[1]]
    more = {"semantic": nnunet_loss()} if by_dice else {}
    return lambda device: training(config, truth, classes, with_optimizer=True, compiled=compiled, **more)(device)


def _light(patch: tuple[int, ...]) -> MaskSAMConfig:
    return MaskSAMConfig("lite_medsam", patch, 1)


def cases(sizes: Sizes) -> list[Case]:
    def by_shape(patch: tuple[int, ...]) -> str:
        return "x".join(map(str, patch))

    forms: dict[str, Callable[..., Tensor] | None] = {
        "ours, PyTorch's choice": _as_taken,
        "values padded, FlashAttention": partial(_folded, True, FLASH),
        "values padded, cuDNN": partial(_folded, True, CUDNN),
        "values padded, memory-efficient": partial(_folded, True, EFFICIENT),
        "values as they are, memory-efficient": partial(_folded, False, EFFICIENT),
        "materialised": None,
    }
    flex: dict[str, Callable[..., Tensor] | None] = {"FlexAttention": _flex, "ours, PyTorch's choice": _as_taken}
    blocks = {
        f"global block ({sizes.images} images of {sizes.tokens}x{sizes.tokens} tokens)": (sizes.images, sizes.tokens),
        f"windows ({sizes.windows} of 14x14 tokens)": (sizes.windows, 14),
    }
    vit_b = {
        "ours": MaskSAMConfig("vit_b", sizes.vit_b, 4, 8, "slice"),
        "checkpointing": MaskSAMConfig("vit_b", sizes.vit_b, 4, 8, "slice", checkpointing=True),
        "dense start": MaskSAMConfig("vit_b", sizes.vit_b, 4),
    }
    light, plan = _light(sizes.acdc), f"patch {by_shape(sizes.acdc)}, batch 2; network, loss and AdamW"
    whole = f"volume {by_shape(sizes.case)}, patch {by_shape(sizes.acdc)}, eight mirrors"

    def predicted(ours: bool) -> Builder:
        def ours_of() -> tuple[nn.Module, MaskSAMConfig]:
            return MaskSAM(light, 1, 4).eval(), light

        theirs = partial(stock, sizes.acdc, ACDC_SPACING)
        return prediction(ours_of if ours else theirs, ours, sizes.case, sizes.acdc)

    heads, plans = "12 heads of 64", (sizes.acdc, ACDC_SPACING)
    biased = f"{sizes.windows} windows of 14x14 tokens, 5 heads of 32"
    return [
        *(
            Case(f"kernels of attention, {name}", heads, {form: _kernel(f, *size) for form, f in forms.items()})
            for name, size in blocks.items()
        ),
        Case(
            "kernels of attention, TinyViT's windows with a bias",
            biased,
            {
                form: _tiny_vit_windows(form, sizes.windows)
                for form in ("aligned", "aligned, memory-efficient", "aligned, cuDNN", "plain", "as it is")
            },
        ),
        Case(
            "training step of ViT-B at 1024 pixels",
            f"patch {by_shape(sizes.vit_b)}, batch 2, r = 4, K = 4, N = 8 or 1 a class; network, loss and AdamW",
            {name: _step(config, 4) for name, config in vit_b.items()},
        ),
        Case(
            "training step at ACDC's plain plan",
            plan,
            {"LiteMedSAM": _step(light, 4, by_dice=True), "nnU-Net": unet_step(False, *plans, with_optimizer=True)},
        ),
        Case(
            "prediction of an ACDC case",
            whole,
            {"LiteMedSAM, masksam predict": predicted(True), "nnU-Net, nnUNetv2_predict": predicted(False)},
        ),
        *(
            Case(f"torch.compile, {name}", heads, {form: _kernel(f, *size) for form, f in flex.items()}, memory=False)
            for name, size in blocks.items()
        ),
        Case(
            "torch.compile, TinyViT's windows with a bias",
            biased,
            {form: _tiny_vit_windows(form, sizes.windows) for form in ("FlexAttention", "as it is")},
            memory=False,
        ),
        Case(
            "torch.compile, nnU-Net's training step",
            plan,
            {
                "compiled": unet_step(False, *plans, with_optimizer=True, compiled=True),
                "not compiled": unet_step(False, *plans, with_optimizer=True),
            },
            memory=False,
        ),
        Case(
            "torch.compile, LiteMedSAM's training step",
            plan,
            {"compiled": _step(light, 4, True, by_dice=True), "not compiled": _step(light, 4, by_dice=True)},
            memory=False,
        ),
    ]
