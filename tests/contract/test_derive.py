"""Configs for plain plans: a function of plans, dataset.json and backbone only."""

from __future__ import annotations

import pytest
from plain_plans import dataset_json, plain_plans, region_dataset_json, simple_cost

from masksam_nnunet.config import Z_SCORES
from masksam_nnunet.cost import training_cost
from masksam_nnunet.plans import architecture
from masksam_nnunet.plans.architecture import MASKED_Z_SCORES, derive_config, intensity_ranges


@pytest.mark.parametrize(
    ("patch", "resolution", "gib", "tflop"), [((20, 256, 224), 2, 16.4, 25.3), ((4, 256, 256), 4, 14.4, 36.8)]
)
def test_vit_b_on_acdc(patch: tuple[int, ...], resolution: float, gib: float, tflop: float) -> None:
    """20x256x224 in batch 2 is 40 slices a step, as nnU-Net plans all of ACDC; 4x256x256 is the paper's patch."""
    config = derive_config(plain_plans(patch), "3d_fullres", dataset_json(4), "vit_b")
    assert (config.resolution, config.checkpointing, config.queries(4)) == (resolution, False, 4)
    cost = training_cost(config, 1, 4, 2)
    assert (cost.peak_gib, cost.tflop) == pytest.approx((gib, tflop), rel=0.05)  # as the pages say


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "training_cost", simple_cost)


@pytest.mark.usefixtures("simple")
@pytest.mark.parametrize(
    ("patch", "batch", "classes", "backbone", "expected"),
    [
        ((128, 128, 128), 8, 3, "vit_b", {"resolution": 1, "checkpointing": False}),
        ((64, 512, 512), 8, 16, "vit_h", {"resolution": 1, "checkpointing": True}),  # what fits nothing gets a network
        ((1, 320, 512), 1, 2, "vit_b", {"resolution": 2}),  # SAM's input stays within its size
    ],
)
def test_other_patches(
    patch: tuple[int, ...],
    batch: int,
    classes: int,
    backbone: str,
    expected: dict[str, object],
) -> None:
    config = derive_config(plain_plans(patch, batch_size=batch), "3d_fullres", dataset_json(classes), backbone)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.usefixtures("simple")
def test_regions_are_known_to_the_network() -> None:
    config = derive_config(plain_plans(), "3d_fullres", region_dataset_json(), "tiny")
    assert config.regions and config.queries(2) == 2
    assert not derive_config(plain_plans(), "3d_fullres", dataset_json(), "tiny").regions


def test_black_and_white_follow_from_the_normalisation() -> None:
    ct = {"mean": 100.0, "std": 50.0, "percentile_00_5": -50.0, "percentile_99_5": 300.0}
    empty = dict.fromkeys(ct, float("nan"))
    channels = [
        ("CTNormalization", False, ct, (-3.0, 4.0)),
        ("CTNormalization", False, empty, Z_SCORES),
        ("NoNormalization", False, ct, (-50.0, 300.0)),
        ("RGBTo01Normalization", False, ct, (0.0, 1.0)),
        ("ZScoreNormalization", False, ct, Z_SCORES),
        ("ZScoreNormalization", True, ct, MASKED_Z_SCORES),
    ]
    schemes, masked, properties, expected = zip(*channels, strict=True)
    plans = {"foreground_intensity_properties_per_channel": {str(i): p for i, p in enumerate(properties)}}
    assert intensity_ranges(plans, schemes, masked) == expected
