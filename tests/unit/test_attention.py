"""Attention without its matrix equals segment-anything's, values and gradients, whatever the grid."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from masksam_nnunet.modeling import attention as module
from masksam_nnunet.modeling.attention import self_attention


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
