"""Steps of the trainer on CUDA tensors without content: devices, number formats, and where the host would wait."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import PAPER, UNET
from fake_cuda import CUDA, fake_cuda, move, without_content
from plain_plans import batch, dataset_json, folders, plain_plans, region_dataset_json, simple_cost, tiny_plans
from torch._subclasses.fake_tensor import DataDependentOutputException

from masksam_nnunet import trainers
from masksam_nnunet.config import LossConfig
from masksam_nnunet.cost import dice_and_cross_entropy
from masksam_nnunet.inference.predictor import MaskSAMPredictor
from masksam_nnunet.method import MASKSAM, methods
from masksam_nnunet.modeling import MaskSAMOutput
from masksam_nnunet.plans import architecture
from masksam_nnunet.trainers import MaskSAMTrainer

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
TARGETS, COSTS = ["nonzero"], ["copy", "copy"]  # the second brings the matches back
"""The host waits once a step: to know which targets there are, or for the costs of matching."""
NNUNETS_LOSS = ["item"] * 4
"""nnU-Net's own loss asks whether any voxel is not ignored, here of the output and of three maps."""
FEW = LossConfig(num_points=64)
REGIONS = {"form": {"regions": True, "loss": FEW}}
VOLUME = PAPER | {"matching": "volume", "loss": FEW}
Case = tuple[dict[str, Any], dict[str, Any], torch.dtype, list[str]]
# Without several queries a class: connected parts are found on the host, from what a mask holds.
CASES: dict[str, Case] = {
    "3d": ({}, dataset_json(), BF16, TARGETS),
    "float16, ignore": ({}, dataset_json(ignore=True), FP16, TARGETS + NNUNETS_LOSS),
    "2d": ({"patch": (32, 48)}, dataset_json(), BF16, TARGETS),
    "regions and ignore, few points": (REGIONS, region_dataset_json(ignore=True), BF16, TARGETS),
    "the paper's form": ({"form": PAPER}, dataset_json(), BF16, COSTS),
    "the same by volume, few points": ({"form": VOLUME}, dataset_json(), BF16, COSTS),
    "a U-Net": ({"form": {"generator": UNET}}, dataset_json(), BF16, TARGETS),
    "checkpointing": ({"form": {"checkpointing": True}}, dataset_json(), BF16, TARGETS),
    "many classes": ({}, dataset_json(40), BF16, ["number", *TARGETS]),
}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)
    monkeypatch.setattr(architecture, "training_cost", simple_cost)


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_and_prediction(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, description, dtype, waits = deepcopy(CASES[case])
    made = trainers.MaskSAMTrainer_tiny(tiny_plans(**plans), "3d_fullres", 0, description, CPU)
    assert waits_of_steps(made, dtype, monkeypatch) == waits


@pytest.mark.parametrize(
    ("dtype", "stored"), [(BF16, None), (BF16, BF16), (FP16, None)], ids=["bfloat16", "stored in bfloat16", "float16"]
)
@pytest.mark.parametrize("cls", [MaskSAMTrainer, trainers.MaskSAMTrainer_lite_medsam, trainers.SAMedTrainer])
def test_a_step_with_sam(
    cls: type[MaskSAMTrainer], dtype: torch.dtype, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cls(plain_plans((2, 64, 64), batch_size=1), "3d_fullres", 0, dataset_json(), CPU)
    made.initialize()
    if stored is not None:
        frozen = sum(p.numel() for p in made.sam_network.image_encoder.parameters() if not p.requires_grad)
        saved = made.sam_network.store_frozen(stored)
        assert 0.5 < saved / (2 * frozen) < 1
    waits = TARGETS if made.config.method == MASKSAM else []
    assert waits_of_steps(made, dtype, monkeypatch) == waits


@pytest.mark.parametrize("name", [method.trainer for method in methods().values() if method.name != MASKSAM])
def test_a_step_of_a_related_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = getattr(trainers, name)(tiny_plans((2, 32, 32)), "3d_fullres", 0, dataset_json(), CPU)
    assert waits_of_steps(made, BF16, monkeypatch) == []


def test_a_related_method_in_float16_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainers.HSAMTrainer(tiny_plans((32, 48)), "3d_fullres", 0, dataset_json(ignore=True), CPU)
    assert waits_of_steps(made, FP16, monkeypatch) == ["item"] * 2  # of two stages


def test_windows_and_mirrors_of_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainers.MaskSAMTrainer_tiny(tiny_plans(), "3d_fullres", 0, dataset_json(), CPU)
    made.initialize()
    predictor = MaskSAMPredictor(device=CUDA, allow_tqdm=False, batch_size=16)
    predictor.manual_initialization(
        made.network.eval(), made.plans_manager, made.configuration_manager, None, made.dataset_json, "", (0, 1, 2)
    )
    with fake_cuda(monkeypatch, FP16) as waits, torch.no_grad(), torch.autocast("cuda"):
        move(made.network)
        data = torch.zeros(1, 6, 40, 32, device=CUDA)
        slicers = predictor._internal_get_sliding_window_slicers(data.shape[1:])
        waits.clear()
        found = list(predictor._mean_over_mirrors(data, slicers))
        assert {(x.device, x.shape) for x in found} == {(CUDA, (3, 4, 32, 32))}
    assert len(found) == 4 and waits == ["item"] * 2, "two batches of 32 mirrored windows"


def test_the_loss_of_estimates_and_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, BF16):
        for channels in (1, 4):  # labels, regions
            target = torch.zeros(2, channels, 8, 8, device=CUDA)
            assert dice_and_cross_entropy(torch.randn(2, 4, 8, 8, device=CUDA), target).device == CUDA


def waits_of_steps(made: MaskSAMTrainer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the host waits in a step of training. In one of prediction it asks once whether float16 sufficed."""
    if not made.was_initialized:
        made.initialize()
    made.on_train_epoch_start()
    given = batch(made)
    with fake_cuda(monkeypatch, dtype) as waits:
        move(made.network)
        made.device = CUDA
        made.optimizer, _ = made.configure_optimizers()
        made.grad_scaler = torch.amp.GradScaler("cuda") if dtype == FP16 else None
        seen: list[Any] = []
        made.network.register_forward_hook(lambda _, __, output: seen.append(output))
        data, target = without_content(given["data"]), without_content(given["target"])
        waits.clear()  # of moving the network there
        outputs = made.train_step({"data": data, "target": target})
        assert all(value.device == CUDA for value in outputs.values())
        output = seen[0]
        maps = output
        if isinstance(output, MaskSAMOutput):
            shares = bool(output.class_maps) and not made.label_manager.has_regions
            assert {output.mask_logits.dtype, output.aux_mask_logits.dtype} == {torch.float32 if shares else dtype}
            maps = output.class_maps
        assert {x.dtype for x in maps} <= {dtype}, "as planned, not float32"
        trained = [p for p in made.network.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained)
        of_training = list(waits)
        made.on_train_epoch_end([outputs])
        made.on_validation_epoch_start()
        with torch.no_grad():
            made.validation_step({"data": data, "target": target})
        waits.clear()
        made.network.eval()
        with torch.no_grad(), torch.autocast("cuda"):  # as nnU-Net predicts, in float16
            predicted = made.network(data.to(CUDA, non_blocking=True))
        assert predicted.device == CUDA and predicted.shape == (
            len(data),
            made.label_manager.num_segmentation_heads,
            *data.shape[2:],
        )
    assert waits == ["item"]
    return of_training


def test_what_fails_on_a_gpu_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, BF16) as waits:
        x = torch.zeros(2, 3, device=CUDA, requires_grad=True)
        with pytest.raises(RuntimeError, match="cuda:0"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="bfloat16"):
            x @ torch.zeros(3, 4, device=CUDA, dtype=BF16)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with torch.autocast("cuda", dtype=BF16):
            y = x @ torch.zeros(3, 4, device=CUDA)
        assert y.dtype == BF16 and waits == []
        y.float().sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == torch.float32
        x.detach().cpu()
        assert waits == ["copy"]
