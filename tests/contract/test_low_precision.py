"""Steps and predictions in the number formats of GPUs, computed on the CPU with their rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from configs import PAPER, UNET
from nnunet_workspace import SHARED
from plain_plans import batch, dataset_json, folders, simple_cost, tiny_plans
from torch import Tensor

from masksam_nnunet import trainers
from masksam_nnunet.plans import architecture
from masksam_nnunet.trainers import MaskSAMTrainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)


def make(**plans: Any) -> MaskSAMTrainer:
    torch.manual_seed(0)
    made = trainers.MaskSAMTrainer_tiny(tiny_plans(**plans), "3d_fullres", 0, dataset_json(), CPU)
    made.initialize()
    return made


@pytest.mark.parametrize("form", [{}, PAPER, {"generator": UNET}], ids=["dense", "paper", "unet"])
def test_a_step_in_bfloat16_is_near_that_in_float32(form: dict[str, Any]) -> None:
    made = make(form=form)
    with torch.no_grad():  # nothing is zero, as after some steps
        for parameter in made.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    given = batch(made)

    def step(enabled: bool) -> tuple[dict[str, Tensor], Tensor]:
        made.network.zero_grad()
        torch.manual_seed(1)  # of the points at which masks are compared
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = made.network(given["data"])
            loss, terms = made.criterion(output, given["target"])
        loss.backward()
        gradients = [p.grad.flatten() for p in made.network.parameters() if p.grad is not None]
        return terms, torch.cat(gradients)

    (exact, wanted), (rounded, found) = step(False), step(True)
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value.item(), rel=0.02, abs=0.02), name
    assert torch.cosine_similarity(wanted, found, dim=0) > 0.99
    assert found.norm() == pytest.approx(wanted.norm().item(), rel=0.05)


def hippocampus() -> tuple[Tensor, Tensor]:
    """A volume and its labels, (1, 1, 24, 48, 32); a phantom where there is no shared data."""
    folder = SHARED / "Dataset004_Hippocampus"
    if not folder.is_dir():
        z, y, x = np.ogrid[:24, :48, :32]
        distance = ((z - 12) / 8) ** 2 + ((x - 16) / 9) ** 2 + ((y - 24) / 16) ** 2
        labels = (distance < 1) * np.where(y < 24, 1, 2)
        volume = labels + np.random.default_rng(0).normal(0, 0.5, labels.shape)
    else:
        image = next(folder.joinpath("imagesTr").glob("*_001_0000.nii.gz"))
        truth = folder / "labelsTr" / image.name.replace("_0000", "")
        volume, labels = (sitk.GetArrayFromImage(sitk.ReadImage(path))[:24, :48, :32] for path in (image, truth))
    volume = (volume - volume.mean()) / volume.std()
    return torch.tensor(volume, dtype=torch.float32)[None, None], torch.tensor(labels.astype(np.int16))[None, None]


def test_float16_predicts_what_float32_does() -> None:
    """As nnU-Net predicts on a GPU, after a short training on the case."""
    data, target = hippocampus()
    made = make(patch=tuple(data.shape[2:]), batch_size=1)
    made.on_train_epoch_start()
    for _ in range(60):
        made.train_step({"data": data, "target": target})
    made.network.eval()
    with torch.no_grad():
        exact = made.network(data).argmax(1)
        with torch.autocast("cpu", dtype=torch.float16):
            rounded = made.network(data).argmax(1)
    for label in (1, 2):
        ours, theirs, truth = exact == label, rounded == label, target[:, 0] == label
        assert dice(ours, truth) > 0.7
        assert dice(ours, theirs) >= 0.999


def dice(a: Tensor, b: Tensor) -> float:
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()
