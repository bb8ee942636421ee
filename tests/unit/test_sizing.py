"""Sizes under a memory target: they fit, and more memory never buys less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_plans import simple_cost

from masksam_nnunet import gpu
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import DataError
from masksam_nnunet.plans import sizing, speed
from masksam_nnunet.plans.architecture import USABLE, config_for
from masksam_nnunet.plans.sizing import LARGEST_FIRST, Limits, Requirements, Sizes, choose_sizes
from masksam_nnunet.plans.speed import Device, expected_device, find_device, measure

SAMS = ("vit_h", "vit_l", "vit_b")


def requirements(median: tuple[int, ...], **changes: Any) -> Requirements:
    settings: dict[str, Any] = {
        "median_shape": median,
        "channels": 1,
        "classes": 3,
        "regions": False,
        "ignores": False,
        "intensity_ranges": (),
        "spacing": (1.0,) * len(median),
        "generator": "light",
        "largest_batch": lambda voxels: 2,
        **changes,
    }
    return Requirements(**settings)


def limits(memory: float, tflops: float = 400.0, hours: float = 24.0) -> Limits:
    """400 TFLOP/s: 276 TFLOP a step for 500 epochs, 138 for 1000."""
    return Limits(memory, hours, Device("card", memory, tflops, "made up"))


def choose(median: tuple[int, ...], memory: float, backbone: str = "vit_b", **changes: Any) -> Sizes:
    return choose_sizes(requirements(median, **changes), (backbone,), limits(memory))


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
        assert sizes.cost.peak_gib <= 14 < simple_cost(config, 1, 3, 2).peak_gib + 0.4

    def test_more_memory_never_buys_less(self) -> None:
        keys = []
        for memory in (1.5, 2, 3, 4, 6, 8, 12, 24, 48, 96):
            config = choose((24, 128, 128), memory).config
            keys.append((config.resolution, config.patch_size[0], not config.checkpointing))
        assert keys == sorted(keys) and len(set(keys)) > 4

    def test_operations_bound_the_slices(self) -> None:
        sizes = choose_sizes(requirements((500, 256, 256)), ("vit_h",), limits(48.0))
        assert 130 < sizes.cost.tflop <= 138.24 and "138 TFLOP" in sizes.reasons["D"]

    def test_what_takes_more_than_the_hours_is_not_said_to_fit_them(self) -> None:
        """Four slices take 8 TFLOP; 1000 epochs allow 5.2."""
        sizes = choose_sizes(requirements((10, 256, 256)), ("vit_b",), limits(24.0, 15.0))
        assert sizes.config.patch_size[0] == 4 and "more than 5.18 TFLOP" in sizes.reasons["D"]
        whole = requirements((4, 256, 256), largest_batch=lambda voxels: 9)
        sizes = choose_sizes(whole, ("vit_b",), limits(24.0, 15.0))
        assert sizes.batch_size == 2 and "TFLOP" not in sizes.reasons["batch size"]

    def test_hours_choose_the_resolution_before_the_backbone(self) -> None:
        """Four slices take 8 TFLOP with ViT-B at r = 4 and four times as much with ViT-H."""
        for tflops, expected in (
            (100.0, ("vit_h", 4)),
            (30.0, ("vit_l", 4)),
            (15.0, ("vit_b", 4)),
            (2.5, ("vit_l", 1)),
        ):
            config = choose_sizes(requirements((4, 256, 256)), SAMS, limits(24.0, tflops)).config
            assert (config.backbone, config.resolution) == expected
        slow = choose_sizes(requirements((4, 256, 256)), SAMS, limits(24.0, 0.1))
        assert (slow.config.backbone, slow.config.resolution) == ("vit_b", 1) and "none fits" in slow.reasons[
            "backbone"
        ]

    def test_epochs_are_lowered_for_the_hours_and_said_so(self) -> None:
        for hours, epochs in ((24.0, 860), (100.0, 1000), (0.1, 100)):
            within = limits(24.0, 20.0, hours)
            sizes = choose_sizes(requirements((4, 256, 256)), ("vit_b",), limits(24.0))
            assert sizes.cost.tflop == 8
            assert within.device.epochs(sizes.cost.tflop, hours) == epochs
            rows = {
                row["what"]: row
                for row in sizes.table(epochs, Limits(24.0, hours, within.device), 1.0)
                if row["what"] in ("epochs", "time")
            }
            assert rows["epochs"]["value"] == epochs
            assert ("more than --hours" in rows["epochs"]["why"]) == (epochs < 1000)
            assert ("more than --hours" in rows["time"]["why"]) == (hours == 0.1)

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
            sizes = choose_sizes(requirements((4, 64, 64)), LARGEST_FIRST, limits(memory))
            assert sizes.config.backbone == backbone

    def test_nothing_fits_and_the_least_memory_that_is_named_does(self) -> None:
        with pytest.raises(DataError, match=r"--gpu-memory 1 .*--backbone"):
            choose((4, 64, 64), 1.0, "vit_h")
        with pytest.raises(DataError, match=r"--gpu-memory 1 .* lite_medsam .*\(1, 64, 64\)") as refusal:
            choose_sizes(requirements((4, 64, 64)), LARGEST_FIRST, limits(1.0))
        enough = float(str(refusal.value).split("give --gpu-memory ")[1].split(" or more")[0])
        assert choose((4, 64, 64), enough, "lite_medsam").cost.peak_gib <= enough * USABLE


def test_a_device_is_named_measured_or_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(torch.device("cpu"), config_for("lite_medsam", (2, 64, 64), regions=False), 0.1) > 0
    assert find_device("CPU") == find_device("cpu") == expected_device(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    assert find_device("cpu").precision == "float32" and find_device("cpu").tflops == pytest.approx(4 * speed.CPU_CORE)
    assert find_device("A100").memory_gb == 80 and find_device("a100").precision == "bfloat16"
    with pytest.raises(DataError, match="gtx1080"):
        find_device("gtx1080")
    cuda = torch.device("cuda")
    names = {"NVIDIA GeForce RTX 4090": True, "NVIDIA GeForce RTX 4090 Laptop GPU": False, "Tesla T4": False}
    for name, known in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert (expected_device(cuda) is not None) == known, name
    assert expected_device(torch.device("cpu")) is not None and expected_device(torch.device("mps")) is None


def test_a_busy_gpu_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device, config: MaskSAMConfig, seconds: float) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "automatic_device", lambda: "cuda")
    card = SimpleNamespace(name="A card", total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(speed, "measure", busy)
    with pytest.raises(DataError, match=r"A card.*--gpu"):
        find_device(None)


def test_a_gpu_without_kernels_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gpu_trouble", lambda: "A card has compute capability 3.5")
    assert find_device(None).name == speed.ASSUMED
