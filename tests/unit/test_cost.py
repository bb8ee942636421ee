"""The estimate runs the real network: it must know what makes a step dearer, and what a small one really takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from masksam_nnunet import cost
from masksam_nnunet.config import Z_SCORES, MaskSAMConfig
from masksam_nnunet.cost import training_cost
from masksam_nnunet.metering import Meter
from masksam_nnunet.modeling import MaskSAM, count_parameters
from masksam_nnunet.plans.architecture import config_for


def test_more_of_anything_costs_more() -> None:
    config = tiny_config(patch_size=(2, 32, 32))
    base, *more = (
        training_cost(config, 1, 3, 1),
        training_cost(config, 1, 3, 2),
        training_cost(config, 1, 8, 1),
        training_cost(replace(config, num_queries=4), 1, 3, 1),
    )
    for dearer in more:
        assert dearer.peak_bytes > base.peak_bytes and dearer.flops > base.flops


@pytest.mark.parametrize("more", [{}, {"matching": "slice", "num_queries": 12, "checkpointing": True}])
def test_queries_that_are_decoded_one_by_one_are_counted_without_decoding_each(more: dict[str, Any]) -> None:
    config = MaskSAMConfig("lite_medsam", (6, 128, 128), 4, **more)
    quick, whole = training_cost(config, 1, 9, 2), cost._run(config, 1, 9, 2, 9, "bfloat16")
    assert (quick.peak_bytes, quick.flops) == pytest.approx((whole.peak_bytes, whole.flops), rel=1e-3)


def test_a_cascade_adds_channels_to_the_image() -> None:
    config = tiny_config(intensity_ranges=((0.0, 1.0),))
    assert training_cost(config, 3, 2, 2).flops > training_cost(config, 1, 2, 2).flops


def test_ignored_voxels_take_memory() -> None:
    config = tiny_config(patch_size=(2, 256, 256))
    plain, ignoring = (training_cost(config, 1, 3, 2, ignores=ignores) for ignores in (False, True))
    assert ignoring.peak_bytes > plain.peak_bytes


def test_attention_sums_the_querys_gradient_in_float32() -> None:
    shape, size = (2, 4, 64, 32), 2 * 4 * 64 * 32
    with Meter() as meter:
        query, key, value = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        nn.functional.scaled_dot_product_attention(query, key, value).backward(torch.zeros(shape, dtype=torch.bfloat16))
    sums_of_exponentials = 4 * 2 * 4 * 64
    assert meter.peak == 2 * (4 + 4) * size + sums_of_exponentials + 4 * size, "four tensors, their gradients, and that"


def test_a_meter_counts_as_pytorch_does() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    x = torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    with Meter() as meter:
        hollow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
        hollow(torch.randn(2, 3, 16, 16)).sum().backward()
    assert meter.flops == counter.get_total_flops()
    weights = sum(p.nbytes for p in network.parameters())
    assert meter.now == 2 * weights  # with their gradients
    with pytest.raises(RuntimeError, match="outside of its Meter"):
        hollow[3].weight + 1
    del hollow
    assert meter.now == 0


def test_what_it_counts_as_saved_is_what_autograd_saves() -> None:
    config = tiny_config(patch_size=(6, 64, 96), resolution=2)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network = MaskSAM(config, 1, 3).train()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = network(torch.randn(2, 1, *config.patch_size))
    real = sum(saved.values())
    estimate = training_cost(config, 1, 3, 2).peak_bytes
    assert output.mask_logits.grad_fn is not None
    # The peak also holds gradients, optimizer state and temporaries, of which this tiny network has few.
    assert real < estimate < 1.6 * real


@pytest.mark.parametrize(
    ("checkpointing", "gib", "tflop"),
    [(False, 14.2, 37.2), (True, 4.07, 49.4)],
)
def test_the_readmes_figures(checkpointing: bool, gib: float, tflop: float) -> None:
    found = training_cost(MaskSAMConfig("vit_b", (4, 256, 256), 4, 8, "slice", checkpointing=checkpointing), 1, 4, 2)
    assert (found.peak_gib, found.tflop) == pytest.approx((gib, tflop), rel=0.05)


@pytest.mark.parametrize(
    ("backbone", "resolution", "total", "trained"),
    [
        ("vit_b", 4, 107.5, 13.7),
        ("vit_l", 4, 344.6, 32.2),
        ("vit_h", 4, 701.0, 59.9),
        ("lite_medsam", 1, 11.2, 1.4),
        ("mobile_sam", 4, 17.6, 7.8),
    ],
)
def test_the_documented_numbers_of_parameters(backbone: str, resolution: float, total: float, trained: float) -> None:
    paper = {"matching": "slice", "num_queries": 8}
    config = config_for(backbone, (4, 256, 256), False, intensity_ranges=(Z_SCORES,), resolution=resolution, **paper)
    with FakeTensorMode():
        *_, (_, everything, moving) = count_parameters(MaskSAM(config, 1, 4))
    assert (everything / 1e6, moving / 1e6) == pytest.approx((total, trained), abs=0.06)
