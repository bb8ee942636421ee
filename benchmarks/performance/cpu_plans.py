"""Plans for short trainings on a CPU: batch size 2, a patch of one's own, and LiteMedSAM at r, or nnU-Net's network.

    python benchmarks/performance/cpu_plans.py Dataset027_ACDC LitePlans 4x160x160 0.5
    python benchmarks/performance/cpu_plans.py Dataset027_ACDC SmallPlans 4x160x160 --from nnUNetCPUPlans

The data are those preprocessed for nnUNetPlans; ``--from`` names the plans with the U-Net.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.plans.architecture import BASE_PLANS, config_of_plans, write_config

BATCH_SIZE = 2
BACKBONE = "lite_medsam"


def main(dataset: str, name: str, patch: str, resolution: float | None, base: str) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans = read_json(folder / f"{base}.json")
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": [int(size) for size in patch.split("x")], "batch_size": BATCH_SIZE}
    configuration["data_identifier"] = f"{BASE_PLANS}_3d_fullres"
    if resolution is not None:
        config = config_of_plans(plans, "3d_fullres", read_json(folder / "dataset.json"), BACKBONE)
        write_config(plans, "3d_fullres", replace(config, resolution=resolution))
    write_json(folder / f"{name}.json", plans | {"plans_name": name})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("name")
    parser.add_argument("patch")
    parser.add_argument("resolution", type=float, nargs="?")
    parser.add_argument("--from", dest="base", default=BASE_PLANS)
    main(**vars(parser.parse_args()))
