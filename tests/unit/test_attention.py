"""Attention without its matrix equals segment-anything's, values and gradients, whatever the grid."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from segment_anything.modeling.transformer import Attention as CrossAttention
from torch import nn

from masksam_nnunet.modeling import attention as module
from masksam_nnunet.modeling.attention import decoder_attention, self_attention


# Chunks that hold some queries of a head, a few heads, all of them; or PyTorch's fused attention.
@pytest.mark.parametrize("chunk", [200, 2**13, 2**21, None])
@pytest.mark.parametrize("grid", [(5, 9), (1, 1)])
def test_self_attention_with_relative_positions(
    grid: tuple[int, int], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is None:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
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


def test_frozen_attention_gets_no_gradient_and_large_scores_no_overflow() -> None:
    attention = Attention(32, num_heads=2, use_rel_pos=True, input_size=(6, 6)).requires_grad_(False)
    x = (300 * torch.randn(1, 6, 6, 32)).requires_grad_()
    out = self_attention(attention, x)
    torch.testing.assert_close(out, attention(x), atol=1e-2, rtol=1e-4)
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and attention.rel_pos_h.grad is None


def test_the_decoders_attention() -> None:
    attention = CrossAttention(32, num_heads=4, downsample_rate=2)
    q, k, v = torch.randn(3, 5, 32), torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    torch.testing.assert_close(decoder_attention(attention, q, k, v), attention(q, k, v))
