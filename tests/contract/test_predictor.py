"""The predictor of ``masksam predict`` against nnU-Net's own, on models written by hand."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import tiny_config, with_equal_shares
from made_up_models import trained
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_plans import SMALL_UNET, dataset_json, plain_plans
from small_sam import SMALL_SAM, install_small_sam
from torch import Tensor, nn

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import ModelError
from masksam_nnunet.inference.predictor import MaskSAMPredictor, network_tensors
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.trainers import MaskSAMTrainer

CPU = torch.device("cpu")
PATCHES = {3: (3, 32, 32), 2: (32, 32)}
VOLUME = (3, 40, 32)  # two windows of the 3D patch, six of the 2D one
MIRRORS = {3: (0, 2), 2: (1,)}


@pytest.fixture(autouse=True)
def _small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)


class Model:
    """A results folder with trained folds."""

    def __init__(self, folder: Path, plans: dict[str, Any], trainer: str, mirrors: Iterable[int]) -> None:
        self.folder, self.trainer, self.mirrors = folder, trainer, tuple(mirrors)
        self.plans = plans
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset_json()))
        self.folds = 0

    def add(self, network: nn.Module, **save: bool) -> None:
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": self.trainer,
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": self.mirrors,
            "optimizer_state": {"state": torch.zeros(1000)},
        }
        fold = self.folder / f"fold_{self.folds}"
        fold.mkdir()
        torch.save(checkpoint, fold / "checkpoint_final.pth", **save)
        self.folds += 1

    def load(self, cls: type[nnUNetPredictor], **options: Any) -> Any:
        """A predictor with all folds."""
        settings = {"device": CPU, "perform_everything_on_device": False, "allow_tqdm": False, **options}
        predictor = cls(**settings)
        predictor.initialize_from_trained_model_folder(str(self.folder), tuple(range(self.folds)))
        return predictor


def masksam_model(folder: Path, folds: int, dims: int = 3, backbone: str = "vit_b") -> tuple[Model, Any]:
    plans = plain_plans(PATCHES[dims])
    write_config(plans, "3d_fullres", tiny_config(patch_size=PATCHES[dims], backbone=backbone))
    model = Model(folder, plans, "MaskSAMTrainer", MIRRORS[dims])
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    network = with_equal_shares(MaskSAMTrainer.build_network_architecture(manager, configuration, 1, 3))
    for _ in range(folds):
        model.add(trained(network))
    return model, network


def assert_same(received: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of sums in float16, which is coarse in the corners of windows."""
    assert received.shape == expected.shape and received.dtype == expected.dtype == torch.half
    assert ((received.float() - expected.float()).abs() > 0.01).float().mean() < 0.01 < expected.float().std()


def held_bytes(predictor: MaskSAMPredictor) -> int:
    tensors = [*network_tensors(predictor.network).values()]
    tensors += [tensor for own in predictor.list_of_parameters for tensor in own.values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("dims", "mirroring", "gaussian"), [(3, True, True), (2, True, False), (2, False, True)])
def test_folds_windows_and_mirrors_as_in_nnunet(dims: int, mirroring: bool, gaussian: bool, tmp_path: Path) -> None:
    model, _ = masksam_model(tmp_path, folds=2, dims=dims)
    data = torch.randn(1, *VOLUME)
    options = {"use_mirroring": mirroring, "use_gaussian": gaussian}
    expected = model.load(nnUNetPredictor, **options).predict_logits_from_preprocessed_data(data)
    pairs = (2 if dims == 3 else 6) * (2 ** len(MIRRORS[dims]) if mirroring else 1)
    for size in (1, 3):
        predictor = model.load(MaskSAMPredictor, batch_size=size, **options)
        calls: list[int] = []
        predictor.network.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(len(inputs[0])))
        received = predictor.predict_logits_from_preprocessed_data(data)
        assert calls and sum(calls) == 2 * pairs and len(calls) == 2 * math.ceil(pairs / predictor.batches.size)
        assert_same(received, expected)
        if size == 1:
            assert torch.equal(received, expected)


@pytest.mark.parametrize("backbone", ["vit_b", "tiny"])
def test_memory_grows_by_what_differs_between_folds(backbone: str, tmp_path: Path) -> None:
    """What is trained; and a frozen tensor where it does differ, here in a fold in PyTorch's old format."""
    model, network = masksam_model(tmp_path, folds=1, backbone=backbone)
    trainable = nbytes(p for p in network.parameters() if p.requires_grad)
    alone = held_bytes(model.load(MaskSAMPredictor))
    assert alone == nbytes(network_tensors(network).values())
    model.add(trained(network))
    assert held_bytes(model.load(MaskSAMPredictor)) == alone + 2 * trainable
    if backbone == "tiny":  # nothing is frozen
        return
    other = deepcopy(network)
    frozen = other.get_parameter("image_encoder.blocks.1.mlp.lin1.weight")
    with torch.no_grad():
        frozen.add_(1.0)
    model.add(trained(other), _use_new_zipfile_serialization=False)
    predictor = model.load(MaskSAMPredictor, batch_size=1)
    assert held_bytes(predictor) == alone + 3 * trainable + 2 * nbytes([frozen])
    data = torch.randn(1, *PATCHES[3])
    expected = model.load(nnUNetPredictor).predict_logits_from_preprocessed_data(data)
    for _ in range(2):  # the second case starts from the last fold's weights
        assert torch.equal(predictor.predict_logits_from_preprocessed_data(data), expected)


def test_lean_and_full_checkpoints_of_one_sam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install_small_sam(tmp_path / "cache", monkeypatch)
    model, network = masksam_model(tmp_path, folds=0)
    network.load_sam(file)
    with network.lean_state_dicts():
        model.add(trained(network))
    model.add(trained(network))
    predictor = model.load(MaskSAMPredictor, batch_size=1)
    trainable = nbytes(p for p in network.parameters() if p.requires_grad)
    assert held_bytes(predictor) == nbytes(network_tensors(network).values()) + 2 * trainable
    data = torch.randn(1, *PATCHES[3])
    expected = model.load(nnUNetPredictor).predict_logits_from_preprocessed_data(data)
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(data), expected)


def test_stock_networks_and_compiled_ones(tmp_path: Path) -> None:
    """A U-Net whose modules have several names, and buffers that are trained; nothing of it is frozen."""
    plans = plain_plans((8, 16, 16))
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = SMALL_UNET
    model = Model(tmp_path, plans, "nnUNetTrainer", (0,))
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, 3, False)
    for _ in range(2):
        trained(network)(torch.randn(2, 1, 8, 16, 16))  # in training mode: statistics move
        model.add(network)
    data = torch.randn(1, 8, 24, 16)
    expected = model.load(nnUNetPredictor).predict_logits_from_preprocessed_data(data)
    predictor = model.load(MaskSAMPredictor, batch_size=3)
    held = [t for n, t in network_tensors(network).items() if not n.endswith("num_batches_tracked")]
    assert held_bytes(predictor) <= 3 * nbytes(held) + 1000
    assert_same(predictor.predict_logits_from_preprocessed_data(data), expected)
    with torch.compiler.set_stance("force_eager"):
        predictor.network = torch.compile(predictor.network)
        assert_same(predictor.predict_logits_from_preprocessed_data(data), expected)


def test_when_results_do_not_fit_on_the_device_nothing_is_summed_twice(tmp_path: Path) -> None:
    model, _ = masksam_model(tmp_path, folds=1)
    data = torch.randn(1, *VOLUME)
    expected = model.load(MaskSAMPredictor, batch_size=2).predict_logits_from_preprocessed_data(data)
    predictor = model.load(MaskSAMPredictor, batch_size=4)
    predictor.perform_everything_on_device = True
    failures = iter([False, True, True])  # in the first attempt, with batches of 4, 4 and 2
    volumes: list[int] = []

    def fail(_: nn.Module, inputs: tuple[Tensor]) -> None:
        kinds = [o for o in gc.get_objects() if type(o) is Tensor and o.dtype == torch.half and o.ndim == 4]
        volumes.append(len([o for o in kinds if o.shape == (3, *VOLUME)]))
        if next(failures, False):
            raise RuntimeError("broken") if len(inputs[0]) == 2 else torch.OutOfMemoryError("CUDA out of memory")

    predictor.network.register_forward_pre_hook(fail)
    received = predictor.predict_logits_from_preprocessed_data(data)
    assert_same(received, expected)
    assert predictor.batches.size == 2 and volumes == [volumes[0]] * len(volumes), "the failed attempt's are freed"


def test_errors(tmp_path: Path) -> None:
    model, network = masksam_model(tmp_path, folds=0)
    with pytest.raises(ModelError, match=r"checkpoint_final\.pth"):
        model.load(MaskSAMPredictor)
    model.add(trained(network))
    predictor = model.load(MaskSAMPredictor)
    predictor.network.register_forward_hook(lambda *_: torch.full((2, 3, *PATCHES[3]), 1e5))
    with pytest.raises(RuntimeError, match="65504"):
        predictor.predict_logits_from_preprocessed_data(torch.zeros(1, *PATCHES[3]))


def test_every_method_that_is_overridden_exists_in_nnunet() -> None:
    own = {"_plain_network", "_mean_over_windows", "_mean_over_mirrors", "logits_of_folds", "hold_fold"}
    for name in set(vars(MaskSAMPredictor)) - own:
        assert name.startswith("__") or hasattr(nnUNetPredictor, name), f"nnU-Net no longer calls {name}"
