"""Lean checkpoints and their export against nnU-Net's own loading, validation and prediction, without data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import tiny_config
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from plain_plans import DATASET, dataset_json, folders, plain_plans
from small_sam import install_small_sam, write_small_sam
from torch import Tensor
from typer.testing import CliRunner, Result

from masksam_nnunet.cli import app as cli
from masksam_nnunet.config import ConfigError
from masksam_nnunet.environment import EXT_TRAINER, LEAN_CHECKPOINTS, RANDOM_INIT, trainer_folder
from masksam_nnunet.errors import MaskSAMError, UsageError, WeightsError
from masksam_nnunet.inference.export.write import CHECKPOINT, export_model
from masksam_nnunet.modeling.sam_network import LEAN
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.sam_files import CHECKPOINTS
from masksam_nnunet.trainers import MaskSAMTrainer

CPU = torch.device("cpu")
PATCH = (2, 32, 48)


@pytest.fixture(autouse=True)
def sam_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folders(tmp_path, monkeypatch)
    monkeypatch.setenv(LEAN_CHECKPOINTS, "1")
    monkeypatch.delenv(RANDOM_INIT, raising=False)
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    return install_small_sam(tmp_path / "cache", monkeypatch)


def trainer(fold: int = 0, backbone: str = "vit_b") -> MaskSAMTrainer:
    plans = plain_plans(PATCH, batch_size=1)
    write_config(plans, "3d_fullres", tiny_config(backbone=backbone, patch_size=PATCH))
    made = MaskSAMTrainer(plans, "3d_fullres", fold, dataset_json(), CPU)
    made.initialize()
    return made


def after_a_step(fold: int = 0) -> MaskSAMTrainer:
    made = trainer(fold)
    made._load_sam()
    step(made)
    return made


def step(made: MaskSAMTrainer) -> None:
    made.network.train()
    torch.manual_seed(made.fold)
    labels = torch.randint(0, 3, (1, 1, *PATCH), dtype=torch.int16)
    made.train_step({"data": torch.randn(1, 1, *PATCH), "target": labels})


def state(made: MaskSAMTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.network.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def log(made: MaskSAMTrainer) -> str:
    return Path(made.log_file).read_text()


def saved(made: MaskSAMTrainer) -> dict[str, Any]:
    """The fold's final checkpoint, once it is written."""
    made.save_checkpoint(str(Path(made.output_folder, CHECKPOINT)))
    return torch.load(Path(made.output_folder, CHECKPOINT), weights_only=False)


def test_training_goes_on_from_lean_and_full_checkpoints_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = after_a_step()
    lean = saved(made)
    assert LEAN in lean["network_weights"] and "checkpoints leave out SAM's frozen weights" in log(made)
    trained = [p for p in made.network.parameters() if p.requires_grad]
    assert len(lean["optimizer_state"]["state"]) == sum(p.grad is not None for p in trained) <= len(trained)
    lean_size = Path(made.output_folder, CHECKPOINT).stat().st_size
    monkeypatch.setenv(LEAN_CHECKPOINTS, "0")
    continued = []
    for switch in ("1", "0"):  # the first goes on from the lean checkpoint and saves a full one
        other = trainer()
        maybe_load_checkpoint(other, continue_training=True, validation_only=False)
        assert_same(state(made), state(other))
        other._load_sam()
        assert LEAN not in saved(other)["network_weights"], switch
        step(other)
        continued.append(state(other))
    assert Path(made.output_folder, CHECKPOINT).stat().st_size > lean_size
    assert_same(*continued)
    monkeypatch.setenv(LEAN_CHECKPOINTS, "1")  # and from a full one to lean ones again
    other = trainer()
    maybe_load_checkpoint(other, continue_training=True, validation_only=False)
    other._load_sam()
    assert LEAN in saved(other)["network_weights"]


def test_validation_restores_and_says_what_it_lacks(sam_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = after_a_step()
    saved(made)
    other = trainer()
    maybe_load_checkpoint(other, continue_training=False, validation_only=True)
    assert_same(state(made), state(other))
    with pytest.raises(AssertionError, match="image_encoder"):  # nnU-Net says that pretrained weights must be full
        load_pretrained_weights(trainer().network, str(Path(made.output_folder, CHECKPOINT)))
    sam_file.unlink()
    with pytest.raises(WeightsError, match=r"lean checkpoint.*masksam weights sam_vit_b.*masksam export"):
        maybe_load_checkpoint(trainer(), continue_training=False, validation_only=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(made)
    assert made.sam_network.sam_tensors().keys() <= made.network.state_dict().keys(), (
        "lean for as long as it is saved only"
    )


def test_a_dataset_that_sam_may_have_seen_is_named_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKPOINTS, "sam_vit_b", replace(CHECKPOINTS["sam_vit_b"], trained_on={"everything": ""}))
    made = trainer()
    made._load_sam()
    assert "WARNING: sam_vit_b was trained on everything" in log(made)


def test_what_cannot_be_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(backbone="tiny")
    made._load_sam()
    assert "MASKSAM_LEAN_CHECKPOINTS has no effect" in log(made)
    assert saved(made)["network_weights"].keys() == made.network.state_dict().keys()
    monkeypatch.setenv(RANDOM_INIT, "1")
    with pytest.raises(ConfigError, match=r"MASKSAM_LEAN_CHECKPOINTS is set.*MASKSAM_RANDOM_INIT"):
        trainer().on_train_start()
    monkeypatch.setenv(LEAN_CHECKPOINTS, "perhaps")
    with pytest.raises(ConfigError, match="MASKSAM_LEAN_CHECKPOINTS = 'perhaps'"):
        trainer().on_train_start()


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture()
def model(monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a training of folds 0 and 1 leaves, the second with a full checkpoint."""
    for fold, lean in ((0, "1"), (1, "0")):
        monkeypatch.setenv(LEAN_CHECKPOINTS, lean)
        made = after_a_step(fold)
        saved(made)
        folder = Path(made.output_folder)
        (folder / "progress.png").touch()
        (folder / "validation").mkdir()
        (folder / "validation" / "summary.json").write_text("{}")
    result = folder.parent
    (result / "plans.json").write_text(json.dumps(made.plans_manager.plans))
    (result / "dataset.json").write_text(json.dumps(made.dataset_json))
    (result / "dataset_fingerprint.json").write_text("{}")
    return result


def export(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["export", *words])


def logits(model: Path, folds: tuple[int, ...]) -> Tensor:
    """nnU-Net's own prediction of noise, larger than the patch."""
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    x = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    return predictor.predict_logits_from_preprocessed_data(x)


def test_an_exported_model_predicts_the_same_without_sam(
    model: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(model, (0, 1))
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    result = export(*f"-d 42 -f 0 1 -o {tmp_path}/out/model.zip".split())
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/out/model.zip\n"
    assert "2 checkpoints, of which 1 were lean" in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.zip"]
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    sam_file.unlink()
    with pytest.raises(WeightsError):
        logits(model, (0, 1))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    install_model_from_zip_file(str(tmp_path / "out" / "model.zip"))
    installed = tmp_path / "elsewhere" / DATASET / model.name
    assert {file.relative_to(installed) for file in installed.rglob("*")} >= {
        file.relative_to(model) for file in before if not file.name.startswith("training_log")
    }
    assert (installed / "fold_1" / CHECKPOINT).read_bytes() == before[model / "fold_1" / CHECKPOINT]
    assert torch.equal(logits(installed, (0, 1)), expected)
    lean, full = (torch.load(root / "fold_0" / CHECKPOINT, weights_only=False) for root in (model, installed))
    assert full.keys() == lean.keys() and LEAN not in full["network_weights"]
    assert str(full["optimizer_state"]) == str(lean["optimizer_state"])
    again = trainer()
    maybe_load_checkpoint(again, continue_training=True, validation_only=False)
    assert_same(state(again), full["network_weights"])


MISSING = [
    ("", "-f 0 1 2", "-f 0 1"),
    ("", "-f 0 -c 2d", "MaskSAMTrainer__nnUNetPlans__2d"),
    ("", "-f 0 -tr Other", "Other__nnUNetPlans__*"),
    ("", "-f 0 -d 77", "-d 77"),
    ("plans.json", "-f 0", "plans.json"),
    ("fold_0/validation/summary.json", "-f 0", "validation/summary.json"),
    ("SAM", "-f 0 1", "lean"),
]


def test_what_cannot_be_exported_is_named_and_nothing_is_written(
    model: Path, sam_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "model.zip"
    for lacking, words, said in MISSING:
        file = sam_file if lacking == "SAM" else model / lacking
        if lacking:
            file.rename(tmp_path / "away")
        result = export("-d", "42", "-o", str(output), *words.split())
        assert result.exit_code == 1 and said in result.stderr, result.output
        if lacking:
            (tmp_path / "away").rename(file)
    with monkeypatch.context() as patch:
        patch.setenv("MASKSAM_WEIGHTS", str(write_small_sam(tmp_path / "other.pth")))
        patch.setenv("MASKSAM_WEIGHTS_SHA256", "skip")
        with pytest.raises(WeightsError, match=r"other\.pth"):
            export_model("42", output, "MaskSAMTrainer", "nnUNetPlans", folds=("0",))
    damaged = model / "fold_1" / CHECKPOINT
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(MaskSAMError, match=str(damaged)):
        export_model("42", output, "MaskSAMTrainer", "nnUNetPlans", folds=("0", "1"))
    assert not output.parent.exists()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    output.parent.mkdir()
    output.write_text("earlier")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UsageError, match=str(output)):
        export_model("42", output, "MaskSAMTrainer", "nnUNetPlans", folds=("0",))
    assert output.read_text() == "earlier" and list(output.parent.iterdir()) == [output]
