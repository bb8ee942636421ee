"""Attention without its matrix equals segment-anything's, values and gradients, whatever the grid."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from segment_anything.modeling.transformer import Attention as CrossAttention
from torch import nn

from masksam_nnunet.modeling.attention import fused_attention, fused_cross_attention


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (1, 1), (12, 3)])
def test_self_attention_with_relative_positions(grid: tuple[int, int]) -> None:
    attention = Attention(48, num_heads=4, use_rel_pos=True, input_size=grid)
    for parameter in (attention.rel_pos_h, attention.rel_pos_w):
        nn.init.normal_(parameter)
    x = torch.randn(2, *grid, 48)
    results = []
    for compute in (attention, lambda x: fused_attention(attention, x)):
        attention.zero_grad()
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        out.square().sum().backward()
        results.append((out, leaf.grad, attention.qkv.weight.grad.clone(), attention.rel_pos_h.grad.clone()))
    for expected, received in zip(*results, strict=True):
        torch.testing.assert_close(received, expected, atol=1e-4, rtol=1e-4)


def test_cross_attention() -> None:
    attention = CrossAttention(32, num_heads=4, downsample_rate=2)
    q, k, v = torch.randn(3, 5, 32), torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    torch.testing.assert_close(fused_cross_attention(attention, q, k, v), attention(q, k, v))
