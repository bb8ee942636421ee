"""Attention without its matrix equals segment-anything's, values and gradients, whatever the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import CUDA, fake_cuda
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from masksam_nnunet.modeling import attention as module
from masksam_nnunet.modeling.attention import fused_attention, self_attention


# Chunks that hold some queries of a head, a few heads, all of them; or PyTorch's fused attention, by its values.
@pytest.mark.parametrize("chunk", [200, 2**13, 2**21, "padded", "short"])
@pytest.mark.parametrize("grid", [(5, 9), (1, 1)])
def test_self_attention_with_relative_positions(
    grid: tuple[int, int], chunk: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(chunk, str):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(module, "_takes_short_values", lambda q, k: chunk == "short")
    else:
        monkeypatch.setattr(module, "CHUNK", chunk)
    attention = Attention(48, num_heads=4, use_rel_pos=True, input_size=grid)
    for parameter in (attention.rel_pos_h, attention.rel_pos_w):
        nn.init.normal_(parameter)
    x = torch.randn(3, *grid, 48)
    results = []
    for compute in (attention, lambda x: self_attention(attention, x)):
        attention.zero_grad()
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        (out + out.square()).sum().backward()
        results.append((out, leaf.grad, *(p.grad.clone() for p in attention.parameters())))
    for expected, received in zip(*results, strict=True):
        torch.testing.assert_close(received, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "width"), [(SDPBackend.EFFICIENT_ATTENTION, 12), (SDPBackend.FLASH_ATTENTION, 32), (SDPBackend.MATH, 32)]
)
def test_values_are_filled_up_where_the_kernel_wants_it(
    kernel: SDPBackend, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys have 12 + 5 + 9 numbers, filled up to 32."""
    seen: list[int] = []
    attend = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        seen.append(v.shape[-1])
        return attend(q, k, v, **more)

    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: kernel.value)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    with fake_cuda(monkeypatch, torch.bfloat16):
        qkv, rows, columns = (torch.randn(*size, device=CUDA) for size in ((2, 45, 3, 4, 12), (5, 5, 12), (9, 9, 12)))
        assert fused_attention(qkv, rows, columns, 1.0).shape == (2, 45, 4, 12)
    assert seen == [width]
