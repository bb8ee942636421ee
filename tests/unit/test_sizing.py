"""Sizes under a memory target: they fit, and more memory never buys less."""

from __future__ import annotations

from typing import Any

import pytest
from plain_plans import simple_cost

from masksam_nnunet.errors import DataError
from masksam_nnunet.plans import sizing
from masksam_nnunet.plans.architecture import USABLE
from masksam_nnunet.plans.raw_check import TargetCount
from masksam_nnunet.plans.sizing import LARGEST_FIRST, Requirements, Sizes, choose_sizes


def requirements(median: tuple[int, ...], **changes: Any) -> Requirements:
    settings: dict[str, Any] = {
        "median_shape": median,
        "channels": 1,
        "classes": 3,
        "regions": False,
        "intensity_ranges": (),
        "targets": TargetCount(3, "case", 0, 1),
        "largest_batch": lambda voxels: 2,
        **changes,
    }
    return Requirements(**settings)


def choose(median: tuple[int, ...], memory: float, backbone: str = "vit_b", **changes: Any) -> Sizes:
    return choose_sizes(requirements(median, **changes), (backbone,), memory)


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself is quick; the real estimate takes seconds a time."""
    monkeypatch.setattr(sizing, "training_cost", simple_cost)


@pytest.mark.usefixtures("simple")
class TestSearch:
    def test_as_many_slices_as_fit_and_not_one_less(self) -> None:
        sizes = choose((200, 256, 256), 16.0)  # 14 GiB, of which 13 for activations: 65 * 2^20 pixels; 2 MPixel a slice
        config = sizes.config
        assert (config.resolution, config.checkpointing, config.patch_size) == (4, True, (32, 256, 256))
        assert sizes.cost.peak_gib <= 14 < simple_cost(config, 1, 3, 2, 3).peak_gib + 0.4

    def test_more_memory_never_buys_less(self) -> None:
        keys = []
        for memory in (1.5, 2, 3, 4, 6, 8, 12, 24, 48, 96):
            config = choose((24, 128, 128), memory).config
            keys.append((config.resolution, config.patch_size[0], not config.checkpointing))
        assert keys == sorted(keys) and len(set(keys)) > 4

    def test_operations_bound_the_slices(self) -> None:
        sizes = choose_sizes(requirements((500, 256, 256)), ("vit_h",), 48.0)
        assert 400 < sizes.cost.tflop <= 420 and "420 TFLOP" in sizes.reasons["D"]

    @pytest.mark.parametrize(
        ("median", "patch", "resolution"),
        [
            ((5, 50, 35), (5, 64, 48), 4),
            ((2, 300, 520), (2, 304, 528), 1),
            ((2, 300, 500), (2, 304, 512), 2),
            ((2, 250, 256), (2, 256, 256), 4),
            ((1, 1500, 1100), (1, 1024, 1024), 1),
        ],
    )
    def test_slices_are_whole_up_to_sams_input(
        self, median: tuple[int, ...], patch: tuple[int, ...], resolution: int
    ) -> None:
        config = choose(median, 96.0).config
        assert (config.patch_size, config.resolution) == (patch, resolution)

    def test_two_dimensions_fill_the_batch(self) -> None:
        sizes = choose((64, 48), 24.0, largest_batch=lambda voxels: 40)
        assert (sizes.config.patch_size, sizes.batch_size) == ((64, 48), 40) and "D" not in sizes.reasons
        fewer = choose((256, 256), 12.0, largest_batch=lambda voxels: 400)
        assert 2 < fewer.batch_size < 400 and fewer.config.checkpointing

    def test_little_memory_takes_slices_then_their_size(self) -> None:
        sizes = [choose((24, 512, 512), memory).config for memory in (1.55, 1.3, 1.22)]
        assert [config.resolution for config in sizes] == [1, 1, 1]
        assert sizes[0].patch_size == (3, 512, 512)
        assert sizes[1].patch_size == (1, 512, 512)
        assert sizes[2].patch_size[1] < 512

    def test_the_largest_sam_that_fits_is_taken(self) -> None:
        for memory, backbone in ((1.5, "vit_b"), (2.5, "vit_l"), (24.0, "vit_h")):
            sizes = choose_sizes(requirements((4, 64, 64)), LARGEST_FIRST, memory)
            assert sizes.config.backbone == backbone

    def test_nothing_fits_and_the_least_memory_that_is_named_does(self) -> None:
        with pytest.raises(DataError, match=r"--gpu-memory 1 .*--backbone"):
            choose((4, 64, 64), 1.0, "vit_h")
        with pytest.raises(DataError, match=r"--gpu-memory 1 .* lite_medsam .*\(1, 64, 64\)") as refusal:
            choose_sizes(requirements((4, 64, 64)), LARGEST_FIRST, 1.0)
        enough = float(str(refusal.value).split("give --gpu-memory ")[1].split(" or more")[0])
        assert choose((4, 64, 64), enough, "lite_medsam").cost.peak_gib <= enough * USABLE
