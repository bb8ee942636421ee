"""Plans for short trainings on a CPU: two patches of one size a step, and LiteMedSAM at r, or nnU-Net's U-Net.

    python benchmarks/learning/short_plans.py Dataset027_ACDC LitePlans 4x112x112 0.5
    python benchmarks/learning/short_plans.py Dataset027_ACDC SmallPlans 4x112x112
    python benchmarks/learning/short_plans.py Dataset027_ACDC PaperPlans 4x112x112 0.5 --paper

The data are those preprocessed for nnUNetPlans; a patch of two numbers is for 2d.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from masksam_nnunet.config import MaskSAMConfig, UNetConfig
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.plans.architecture import BASE_PLANS, DECISIONS, config_of_plans, unet_config, write_config

BATCH_SIZE = 2
BACKBONE = "lite_medsam"

PAPER: dict[str, Any] = {"matching": "slice", "num_queries": 8}
"""The paper's form."""


def configuration_of(patch: tuple[int, ...]) -> str:
    """nnU-Net's configuration for patches of so many axes."""
    return "3d_fullres" if len(patch) == 3 else "2d"


def make_plans(
    dataset: str,
    name: str,
    patch: tuple[int, ...],
    change: Callable[[MaskSAMConfig, UNetConfig], MaskSAMConfig] | None,
) -> dict[str, Any]:
    """Plans for LiteMedSAM, written beside nnUNetPlans; with ``change`` None for nnU-Net's own U-Net.

    ``change`` is given the config at r = 1, and the U-Net that nnU-Net plans for the patch.
    """
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans: dict[str, Any] = read_json(folder / f"{BASE_PLANS}.json")
    key = configuration_of(patch)
    configuration = plans["configurations"][key]
    configuration |= {"patch_size": list(patch), "batch_size": BATCH_SIZE}
    unet = unet_config(configuration["spacing"], patch)
    if change is None:
        configuration["architecture"]["arch_kwargs"] |= _nnunet_sizes(unet, len(patch))
    else:
        config = config_of_plans(plans, key, read_json(folder / "dataset.json"), BACKBONE)
        write_config(plans, key, change(config, unet))
    plans |= {"plans_name": name, DECISIONS: {}}
    write_json(folder / f"{name}.json", plans)
    return plans


def _nnunet_sizes(unet: UNetConfig, axes: int) -> dict[str, Any]:
    stages = len(unet.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(unet.features),
        "kernel_sizes": [list(sizes[-axes:]) for sizes in unet.kernel_sizes],
        "strides": [list(sizes[-axes:]) for sizes in unet.strides],
        "n_conv_per_stage": list(unet.blocks),
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


def main(dataset: str, name: str, patch: str, resolution: float | None, paper: bool) -> None:
    form = PAPER if paper else {}
    change = None if resolution is None else lambda config, _: replace(config, resolution=resolution, **form)
    make_plans(dataset, name, tuple(map(int, patch.split("x"))), change)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("name")
    parser.add_argument("patch")
    parser.add_argument("resolution", type=float, nargs="?", help="r; nnU-Net's own U-Net without it")
    parser.add_argument("--paper", action="store_true", help="free queries, as in the paper")
    main(**vars(parser.parse_args()))
