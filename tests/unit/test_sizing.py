"""Sizes under a memory target: they fit, and more memory never buys less."""

from __future__ import annotations

from typing import Any

import pytest

from masksam_nnunet.cost import training_cost
from masksam_nnunet.plans.derive import num_queries
from masksam_nnunet.plans.errors import PlanError
from masksam_nnunet.plans.sizing import LARGEST_FIRST, USABLE, Sizes, Task, choose_sizes


def task(median: tuple[int, ...], **changes: Any) -> Task:
    settings: dict[str, Any] = {
        "median_shape": median,
        "channels": 1,
        "classes": 3,
        "queries": lambda backbone: num_queries(3, backbone),
        "targets_per_slice": 3,
        "where": "case, slice 0",
        "regions": False,
        "largest_batch": lambda voxels: 2,
        **changes,
    }
    return Task(**settings)


def choose(median: tuple[int, ...], memory: float, backbone: str = "vit_b", **changes: Any) -> Sizes:
    return choose_sizes(task(median, **changes), (backbone,), memory)


def test_what_is_chosen_fits_by_the_estimate() -> None:
    sizes = choose((16, 64, 64), 6.0)
    cost = training_cost(sizes.config, 1, 3, sizes.batch_size, 3)
    assert cost == sizes.cost and cost.peak_gib <= 6.0 * USABLE


def test_more_memory_never_buys_less() -> None:
    small, large = (choose((24, 64, 64), memory) for memory in (2.0, 12.0))
    assert small.cost.peak_gib <= 2.0 * USABLE
    key = [(s.config.upsample, s.config.patch_size[0], not s.config.checkpointing) for s in (small, large)]
    assert key[0] < key[1]


def test_slices_are_whole_and_a_multiple_of_sixteen() -> None:
    assert choose((5, 50, 35), 24.0).config.patch_size == (5, 64, 48)


def test_sams_input_is_never_exceeded() -> None:
    sizes = choose((2, 300, 520), 24.0)
    assert sizes.config.upsample == 1 and sizes.config.patch_size == (2, 304, 528)
    assert choose((1, 1500, 1100), 24.0, "vit_t").config.patch_size == (1, 1024, 1024)


def test_two_dimensions_fill_the_batch() -> None:
    sizes = choose((64, 48), 24.0, largest_batch=lambda voxels: 40)
    assert sizes.config.patch_size == (64, 48) and sizes.batch_size == 40
    assert "D" not in sizes.reasons


def test_little_memory_takes_slices_then_their_size() -> None:
    least = choose((24, 256, 256), 1.0)
    assert least.config.upsample == 1 and least.config.checkpointing
    assert least.config.patch_size[0] < 4
    still_less = choose((24, 256, 256), 0.8)
    assert max(still_less.config.patch_size[1:]) < 256


def test_the_largest_sam_that_fits_is_taken() -> None:
    reasons = {}
    for memory, backbone in ((1.5, "vit_b"), (2.5, "vit_l"), (24.0, "vit_h")):
        sizes = choose_sizes(task((4, 64, 64)), LARGEST_FIRST, memory)
        reasons[backbone] = sizes.reasons["backbone"]
        assert sizes.config.backbone == backbone
    assert "vit_h, vit_l would not" in reasons["vit_b"]


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"--gpu-memory 1 is too small for vit_h: .* or a smaller --backbone"):
        choose((4, 64, 64), 1.0, "vit_h")
