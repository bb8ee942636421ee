"""Steps of training and prediction on a GPU that is not there: devices, dtypes and what waits for the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from configs import loss_config
from fake_cuda import backward, fake_cuda
from plain_plans import dataset_json, folders, plain_plans, region_dataset_json
from torch import Tensor

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.environment import RANDOM_INIT
from masksam_nnunet.losses.matching import Matches
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.trainers import MaskSAMTrainer

CUDA = torch.device("cuda", 0)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype]] = {
    "tiny": ({"backbone": "tiny"}, dataset_json(), torch.bfloat16),
    "tiny, 2d": ({"backbone": "tiny", "patch_size": (32, 48)}, dataset_json(), torch.bfloat16),
    "lite_medsam, regions": ({"backbone": "lite_medsam", "regions": True}, region_dataset_json(), torch.float16),
    "lite_medsam, ignore": ({"backbone": "lite_medsam"}, dataset_json(ignore=True), torch.bfloat16),
    "vit_b, checkpointing": ({"backbone": "vit_b", "checkpointing": True}, dataset_json(), torch.bfloat16),
    "vit_b, the paper's form": ({"backbone": "vit_b", "matching": "slice", "num_queries": 4}, dataset_json(), torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv(RANDOM_INIT, "1")
    options, description, dtype = CASES[case]
    config = MaskSAMConfig(**{"patch_size": (2, 32, 48), "resolution": 1, **options})
    plans = plain_plans(config.patch_size)
    write_config(plans, "3d_fullres", config)
    with fake_cuda(dtype) as waits:
        made = MaskSAMTrainer(plans, "3d_fullres", 0, description, CUDA)
        made.initialize()
        monkeypatch.setattr(made.criterion, "assign", assigned)
        monkeypatch.setattr(Tensor, "backward", backward)
        size = (2, 1, *config.patch_size)
        channels = made.label_manager.num_segmentation_heads + made.label_manager.has_ignore_label
        target = torch.zeros(2, channels if config.regions else 1, *config.patch_size, device="cpu")
        batch = {"data": torch.zeros(size, device="cpu"), "target": target}
        waits.clear()
        outputs = made.train_step(batch)
        assert not waits, "nothing but the matching may wait for the GPU"
        assert all(value.device == CUDA for value in outputs.values())
        assert all((p.grad is not None) == p.requires_grad for p in made.network.parameters())
        made.network.eval()
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16):
            predicted = made.network(torch.zeros(size))
        assert predicted.device == CUDA and not waits


def assigned(cost: Tensor | None, targets: Any) -> Matches:
    """A query for each target's place: who is matched is not known of tensors that hold nothing."""
    slices, number = targets.classes.shape
    column = torch.arange(number, device=CUDA).repeat(slices)
    return Matches(torch.arange(slices, device=CUDA).repeat_interleave(number), column, column)
