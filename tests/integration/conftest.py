"""A workspace with a small dataset, planned and preprocessed by nnU-Net's own command."""

from __future__ import annotations

import pytest
from nnunet_workspace import SHARED, Dataset, Workspace, copy_small

from masksam_nnunet.inference.phantoms import write_phantom_dataset

CASES = 10


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("nnunet"))


@pytest.fixture(scope="session")
def dataset(workspace: Workspace) -> Dataset:
    """Ten cases of the real hippocampus data where they are at hand, else of phantoms; plain nnUNetPlans."""
    source = SHARED / "Dataset004_Hippocampus"
    if not source.is_dir():
        source = write_phantom_dataset(workspace.root / "phantoms", num_cases=CASES)
    target = workspace.raw / "Dataset004_Small"
    names = copy_small(source, target, CASES)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    workspace.set_batch_size(target.name, 2)
    return Dataset(target.name, 4, 3, names)
