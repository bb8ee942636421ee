"""Trainings that last, against nnU-Net's loop and its checkpoints, without data."""

from __future__ import annotations

import json
import resource
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import PAPER, UNET
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from plain_plans import dataset_json, folders, tiny_plans
from torch import Tensor, nn

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.errors import TrainingError
from masksam_nnunet.trainers import MaskSAMTrainer_tiny
from masksam_nnunet.trainers.checkpoint_files import BEST, FINAL, LATEST
from masksam_nnunet.trainers.finite_guard import FiniteGuard
from masksam_nnunet.trainers.resumable import ResumableTrainer

CPU = torch.device("cpu")
NAN = float("nan")


class Loader:
    """The batch of an iteration, whenever it is drawn; ``poison`` names those whose first voxel is not a number."""

    def __init__(self, trainer: Any, poison: tuple[int, ...] = ()) -> None:
        self.trainer, self.poison = trainer, poison

    def __next__(self) -> dict[str, Any]:
        iteration = int(self.trainer.iteration)
        torch.manual_seed(iteration)
        data = torch.randn(2, 1, 4, 32, 32)
        if iteration in self.poison:
            data[1, 0, 0, 0, 0] = NAN
        target = torch.randint(0, 3, (2, 1, 4, 32, 32), dtype=torch.int16)
        return {"data": data, "target": target, "keys": np.array(["case_a", "case_b"])}


class Short(MaskSAMTrainer_tiny):
    epochs = 2
    poison: tuple[int, ...] = ()
    stop_after: int | None = None

    def initialize(self) -> None:
        torch.manual_seed(1)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 4, 1
        super().initialize()
        self.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch here

    def on_train_start(self) -> None:  # nnU-Net's own needs data
        self.dataloader_train = self.dataloader_val = Loader(self, self.poison)
        self.iteration = self.current_epoch * self.num_iterations_per_epoch + len(self.outputs)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        if self.iteration == self.stop_after:
            signal.raise_signal(signal.SIGUSR1)
        return outputs


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)


def trainer(cls: type[ResumableTrainer] = Short, go_on: bool = False, **form: Any) -> Any:
    made = cls(tiny_plans(form=form) | {"continue_training": go_on}, "3d_fullres", 0, dataset_json(), CPU)
    maybe_load_checkpoint(made, go_on, False)
    if not made.was_initialized:
        made.initialize()
    return made


def log(made: Any) -> str:
    return Path(made.log_file).read_text()


def weights(made: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.network.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The short training, done."""
    with pytest.MonkeyPatch.context() as patch:
        folders(tmp_path_factory.mktemp("undisturbed"), patch)
        made = trainer()
        made.run_training()
        return made


def final_of(made: Any) -> Path:
    return Path(made.output_folder, FINAL)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_content_is_nnunets_and_nnunet_reads_it(undisturbed: Any, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    made = undisturbed
    made.current_epoch -= 1  # what nnU-Net saves is one more
    made.save_checkpoint(str(ours))
    nnUNetTrainer.save_checkpoint(made, str(theirs))
    made.current_epoch += 1
    one, other = load_checkpoint(ours), load_checkpoint(theirs)
    assert one.keys() - other.keys() == {"masksam_within_epoch", "masksam_own"} and other.keys() <= one.keys()
    for name in other.keys() - {"network_weights"}:
        assert str(one[name]) == str(other[name]), name
    for file in (ours, theirs):
        for load in (ResumableTrainer.load_checkpoint, nnUNetTrainer.load_checkpoint):
            again = trainer()
            load(again, str(file))
            assert again.current_epoch == 2
            assert_same(weights(made), weights(again))


def test_a_checkpoint_of_an_unfused_optimizer_goes_on_fused(undisturbed: Any) -> None:
    """As earlier versions saved it; only a fused one leaves a step out."""
    checkpoint = torch.load(final_of(undisturbed), weights_only=False)
    for group in checkpoint["optimizer_state"]["param_groups"]:
        group.update(fused=None, foreach=None)
    again = trainer()
    again.load_checkpoint(checkpoint)
    assert all(group["fused"] for group in again.optimizer.param_groups)
    before = weights(again)
    again.train_step(next(Loader(again, poison=(again.iteration,))))
    assert_same(before, weights(again))


def test_a_part_of_an_epoch_is_saved_and_gone_on_from(undisturbed: Any) -> None:
    for stop_after in (1, 4, 6):  # within, at the end before the validation, in the last epoch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Short, "stop_after", stop_after)
            made = trainer(go_on=stop_after > 1)
            with pytest.raises(SystemExit) as left:
                made.run_training()
        assert left.value.code == 75 and made.iteration == stop_after
        saved = load_checkpoint(Path(made.output_folder, LATEST))
        assert saved["current_epoch"] == (stop_after - 1) // 4
        assert len(saved["masksam_within_epoch"]["outputs"]["loss"]) == (stop_after - 1) % 4 + 1
        assert {len(values) for values in saved["logging"].values()} == {saved["current_epoch"]}
        assert "Ended by SIGUSR1" in log(made)
    made = trainer(go_on=True)
    assert "1 epochs are done, and 2 iterations of the next" in log(made)
    made.run_training()
    final, expected = load_checkpoint(final_of(made)), load_checkpoint(final_of(undisturbed))
    assert_same(final["network_weights"], expected["network_weights"])
    for name in ("train_losses", "val_losses", "ema_fg_dice", "lrs"):
        np.testing.assert_allclose(final["logging"][name], expected["logging"][name], rtol=1e-6, err_msg=name)
    starts, ends = (final["logging"][f"epoch_{edge}_timestamps"] for edge in ("start", "end"))
    assert all(0 < end - start < 60 for start, end in zip(starts, ends, strict=True))
    assert {file.name for file in Path(made.output_folder).glob("checkpoint*")} == {FINAL, BEST}


@pytest.mark.parametrize("form", [{"generator": UNET}, PAPER])
def test_other_forms_train_go_on_and_predict(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(**form)
    made.run_training()
    expected = weights(made)
    final_of(made).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Short, "stop_after", 6)
        with pytest.raises(SystemExit):
            trainer(**form).run_training()
    made = trainer(go_on=True, **form)
    made.run_training()
    assert_same(weights(made), expected)

    folder = Path(made.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(made.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(made.dataset_json))
    found = "nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name"
    monkeypatch.setattr(found, lambda name: {"Short": Short}[name])
    predictor = nnUNetPredictor(use_gaussian=False, use_mirroring=False, device=CPU, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        alone = made.network.eval()(x[None])[0]
    torch.testing.assert_close(predictor.predict_logits_from_preprocessed_data(x).float(), alone, atol=0.01, rtol=0.01)


def test_minutes_and_epochs_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (trainer().save_every, trainer().save_minutes) == (50, 30)
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", "1epochs,2.5min")
    saved: list[tuple[str, int]] = []
    clock = [0.0]
    monkeypatch.setattr("masksam_nnunet.trainers.resumable.time.monotonic", lambda: clock[0])
    step = Short.train_step

    def slow_step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 60
        return step(self, batch)

    def note(self: Any, file: Path, must: bool) -> None:
        saved.append((file.name, self.iteration))
        ResumableTrainer.save(self, file, must)

    monkeypatch.setattr(Short, "train_step", slow_step)
    monkeypatch.setattr(Short, "save", note)
    trainer().run_training()
    assert [entry for entry in saved if entry[0] != BEST] == [(LATEST, 3), (LATEST, 4), (LATEST, 7), (FINAL, 8)]


def test_a_damaged_checkpoint_is_named_and_another_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Short, "stop_after", 5)
        made = trainer()
        with pytest.raises(SystemExit):
            made.run_training()
    latest, best = (Path(made.output_folder, name) for name in (LATEST, BEST))
    latest.write_bytes(latest.read_bytes()[:-1000])
    made = trainer(go_on=True)
    assert str(latest) in log(made) and made.current_epoch == 1 and not made.outputs, "the best goes on"
    draft = latest.with_name(f".{LATEST}.123")
    draft.write_bytes(b"left by a kill")
    made.run_training()
    assert not draft.exists()
    final_of(made).write_bytes(b"")
    with pytest.raises(TrainingError, match=FINAL):  # the very one that --val wants
        maybe_load_checkpoint(Short(tiny_plans(), "3d_fullres", 0, dataset_json(), CPU), False, True)
    best.write_bytes(b"")
    with pytest.raises(TrainingError, match=f"{FINAL}.*{BEST}"):
        trainer(go_on=True)


def test_a_signal_ends_a_validation_at_once(undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(received: signal.Signals) -> None:
        raise SystemExit(received.name)

    monkeypatch.setattr("masksam_nnunet.trainers.resumable.leave_at_once", leave)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="SIGTERM"):
        undisturbed.perform_actual_validation()


# ---- full disks ------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_but_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files cannot grow over 100 kB from the second epoch on; at the end there must be room again."""
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", "1epochs")
    monkeypatch.setattr(Short, "epochs", 3)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = trainer()
    folder = Path(made.output_folder)
    done = made.on_epoch_end

    def fill_the_disk() -> None:
        if made.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            made._best_ema = -1.0  # the best is to be written too
        done()

    monkeypatch.setattr(made, "on_epoch_end", fill_the_disk)
    try:
        with pytest.raises(TrainingError, match=str(folder / FINAL)):
            made.run_training()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = log(made)
    for name in (LATEST, BEST):
        assert f"WARNING: cannot write {folder / name}" in said
    assert said.count("The training continues.") >= 2
    assert load_checkpoint(folder / LATEST)["current_epoch"] == 1
    assert made._best_ema is None, "what was not written is no mark for later epochs"
    assert not list(folder.glob("*.part"))
    again = trainer(go_on=True)
    assert again.current_epoch == 1
    again.run_training()
    assert load_checkpoint(folder / FINAL)["current_epoch"] == 3


# ---- losses that are not finite --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Short, "poison", (0, 5))
    made = trainer()
    after: list[dict[str, Tensor]] = [weights(made)]
    step = Short.train_step

    def note(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = step(self, batch)
        after.append(weights(made))
        return outputs

    monkeypatch.setattr(Short, "train_step", note)
    made.run_training()
    for number, (before, then) in enumerate(pairwise(after)):
        moved = any(not torch.equal(before[name], then[name]) for name in before)
        assert moved == (number not in (0, 5)), number
        assert all(value.isfinite().all() for value in then.values() if value.is_floating_point())
    counted = {int(state["step"]) for state in made.optimizer.state_dict()["state"].values()}
    assert counted == {6}, "Adam counts the steps that were made"
    assert np.isfinite(made.logger.get_value("train_losses", step=None)).all()
    said = [line.strip() for line in log(made).splitlines() if "WARNING: no step" in line]
    assert len(said) == 2, "each is told of once"
    assert all(part in said[1] for part in ("iteration 5", "class", "image_encoder nan", "case_a, case_b; "))
    assert said[1].endswith("case_b")


def test_too_many_in_a_row_end_it_with_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_MAX_SKIPPED", "3")
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", "1epochs")
    monkeypatch.setattr(Short, "poison", (1, 2, 4, 5, 6))
    made = trainer()
    with pytest.raises(TrainingError, match=r"3 iterations in a row.*\n.*iteration 4.*case_b"):
        made.run_training()
    assert made.iteration == 7
    assert load_checkpoint(Path(made.output_folder, LATEST))["current_epoch"] == 1, "the last good one is kept"


def test_a_gradient_that_is_not_finite_makes_no_step_either() -> None:
    made = trainer()
    made.train_step(next(Loader(made)))
    before = weights(made)
    part: nn.Parameter = next(p for name, p in made.network.named_parameters() if name.startswith("mask_head"))
    handle = part.register_hook(lambda gradient: gradient * torch.inf)
    outputs = made.train_step(next(Loader(made)))
    handle.remove()
    assert outputs["loss"].isfinite() and outputs["skipped"] == 1
    assert_same(before, weights(made))
    made.trouble()
    parts = log(made).split("norms of the gradient: ")[1].split(";")[0].split(", ")
    assert {part.split()[0] for part in parts if part.split()[1] in ("inf", "nan")} == {"mask_head"}
    assert made.train_step(next(Loader(made)))["skipped"] == 0


@pytest.mark.parametrize("poison", [(), (1,)])
def test_a_gradient_scaler_that_comes_down_from_its_start_is_no_trouble(
    poison: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Short, "poison", poison)
    made = trainer()
    made.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # too much for float32 too
    made.run_training()
    moved = {int(state["step"]) for state in made.optimizer.state_dict()["state"].values()}
    assert max(moved) < 7, "the scale has fallen more than once"
    assert made.guard.skipped == len(poison), "a loss that is not finite counts"
    assert ("no step" in log(made)) == bool(poison)


def test_a_scale_that_has_grown_too_far_is_no_trouble_either() -> None:
    guard = FiniteGuard({"part": [nn.Parameter(torch.zeros(1))]}, limit=3)
    bad, good, loss, high, low = (torch.tensor(x) for x in (1.0, 0.0, 1.0, 2.0**16, 2.0**15))
    assert guard.unless_settling(bad, loss, high) == 0
    assert guard.unless_settling(good, loss, low) == 0
    assert guard.unless_settling(bad, loss, low) == 1, "a gradient has fitted with this scale"
    assert guard.unless_settling(bad, loss, high) == 0
    assert guard.unless_settling(bad, loss * torch.nan, high) == 1
