"""Configs for plain plans: a function of plans, dataset.json and backbone only."""

from __future__ import annotations

import pytest
from plain_plans import dataset_json, plain_plans, region_dataset_json

from masksam_nnunet.cost import training_cost
from masksam_nnunet.plans.architecture import MEMORY_GIB, SAM_PROFILE, derive_config, num_queries


@pytest.mark.parametrize(("classes", "queries"), [(1, 8), (4, 8), (14, 24), (16, 24), (60, 64), (120, 120)])
def test_queries_follow_the_papers_recipes(classes: int, queries: int) -> None:
    assert num_queries(classes, "vit_b") == queries


def test_the_tiny_network_has_a_query_to_spare() -> None:
    assert all(num_queries(k, "tiny") > k for k in range(1, 60))


def test_vit_b_on_acdcs_plain_patch_gets_u_4() -> None:
    """20x256x224 in batch 2 is 40 slices a step, as nnU-Net plans all of ACDC."""
    config = derive_config(plain_plans((20, 256, 224)), "3d_fullres", dataset_json(4), "vit_b")
    assert (config.upsample, config.checkpointing, config.num_queries) == (4, True, 8)
    cost = training_cost(config, 1, 4, 2)
    assert cost.peak_gib < MEMORY_GIB and cost.tflop < SAM_PROFILE.max_tflop


def test_a_cube_of_128_gets_less() -> None:
    config = derive_config(plain_plans((128, 128, 128)), "3d_fullres", dataset_json(3), "vit_b")
    assert config.upsample < 4


def test_many_classes_on_plain_plans_get_no_more_queries_than_the_most() -> None:
    config = derive_config(plain_plans((4, 32, 32)), "3d_fullres", dataset_json(120), "tiny")
    assert config.num_queries == 64


def test_what_fits_nothing_still_gets_a_network() -> None:
    config = derive_config(plain_plans((64, 512, 512), batch_size=8), "3d_fullres", dataset_json(16), "vit_h")
    assert (config.upsample, config.checkpointing) == (1, True)


def test_sams_input_stays_within_its_size() -> None:
    config = derive_config(plain_plans((1, 320, 512), batch_size=1), "3d_fullres", dataset_json(2), "vit_b")
    assert config.upsample == 2


def test_regions_are_known_to_the_network() -> None:
    config = derive_config(plain_plans(), "3d_fullres", region_dataset_json(), "tiny")
    assert config.regions and config.num_queries == 4
    assert not derive_config(plain_plans(), "3d_fullres", dataset_json(), "tiny").regions
