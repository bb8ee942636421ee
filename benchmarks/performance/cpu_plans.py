"""Write plans of LiteMedSAM for short trainings on a CPU, with a patch and r of one's own, from preprocessed nnUNetPlans.

    python benchmarks/performance/cpu_plans.py Dataset027_ACDC LitePlans 4x160x160 0.5
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.plans.architecture import BASE_PLANS, config_for, intensity_ranges, num_queries, write_config

BATCH_SIZE = 2


def main(dataset: str, name: str, patch: str, resolution: str) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans = read_json(folder / f"{BASE_PLANS}.json")
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": [int(size) for size in patch.split("x")], "batch_size": BATCH_SIZE}
    manager = PlansManager(plans)
    settings = manager.get_configuration("3d_fullres")
    labels = manager.get_label_manager(read_json(folder / "dataset.json"))
    config = config_for(
        "lite_medsam",
        tuple(settings.patch_size),
        num_queries(labels.num_segmentation_heads, "lite_medsam"),
        labels.has_regions,
        resolution=float(resolution),
        intensity_ranges=intensity_ranges(plans, settings.normalization_schemes, settings.use_mask_for_norm),
    )
    write_config(plans, "3d_fullres", config)
    write_json(folder / f"{name}.json", plans | {"plans_name": name})


if __name__ == "__main__":
    main(*sys.argv[1:])
