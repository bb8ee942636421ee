"""Trainings that last, against nnU-Net's loop and its checkpoints, without data."""

from __future__ import annotations

import resource
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from plain_plans import dataset_json, folders, plain_plans
from torch import Tensor, nn
from typer.testing import CliRunner

from masksam_nnunet.checkpoints import load_checkpoint
from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.errors import CheckpointError, TrainingError
from masksam_nnunet.trainers import MaskSAMTrainer_tiny, MaskSAMTrainer_tiny_budget
from masksam_nnunet.trainers.checkpoint_files import BEST, FINAL, LATEST, PREVIOUS
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
        self.iteration = self.current_epoch * self.num_iterations_per_epoch + self.done_of_epoch

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        if self.iteration == self.stop_after:
            signal.raise_signal(signal.SIGUSR1)
        return outputs


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, monkeypatch)


def trainer(cls: type[ResumableTrainer] = Short, go_on: bool = False) -> Any:
    made = cls(plain_plans() | {"continue_training": go_on}, "3d_fullres", 0, dataset_json(), CPU)
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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final checkpoint of the short training."""
    with pytest.MonkeyPatch.context() as patch:
        folders(tmp_path_factory.mktemp("undisturbed"), patch)
        made = trainer()
        made.run_training()
        return load_checkpoint(Path(made.output_folder, FINAL))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_content_is_nnunets_and_nnunet_reads_it(tmp_path: Path) -> None:
    made = trainer()
    made.on_epoch_start()
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    made.save_checkpoint(str(ours))
    nnUNetTrainer.save_checkpoint(made, str(theirs))
    one, other = load_checkpoint(ours), load_checkpoint(theirs)
    assert other.keys() <= one.keys() and {k for k in one if k not in other} == {"masksam_within_epoch", "masksam_own"}
    for name in other.keys() - {"network_weights"}:
        assert str(one[name]) == str(other[name]), name
    assert_same(one["network_weights"], other["network_weights"])
    for file in (ours, theirs):
        for load in (ResumableTrainer.load_checkpoint, nnUNetTrainer.load_checkpoint):
            again = trainer()
            load(again, str(file))
            assert again.current_epoch == 1
            assert_same(weights(made), weights(again))


def test_a_checkpoint_of_an_unfused_optimizer_goes_on_fused(tmp_path: Path) -> None:
    """As earlier versions saved it; only a fused one leaves a step out."""
    made = trainer()
    made.run_training()
    checkpoint = torch.load(Path(made.output_folder, FINAL), weights_only=False)
    for group in checkpoint["optimizer_state"]["param_groups"]:
        group.update(fused=None, foreach=None)
    torch.save(checkpoint, tmp_path / "earlier.pth")
    again = trainer()
    again.load_checkpoint(str(tmp_path / "earlier.pth"))
    assert all(group["fused"] for group in again.optimizer.param_groups)
    before = weights(again)
    batch = next(Loader(again, poison=(0,)))
    again.train_step(batch)
    assert_same(before, weights(again))


def test_a_part_of_an_epoch_is_saved_and_gone_on_from(undisturbed: dict[str, Any]) -> None:
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
        assert "Ended by SIGUSR1: saved at epoch" in log(made)
    made = trainer(go_on=True)
    assert "1 epochs are done, and 2 iterations of the next" in log(made)
    made.run_training()
    final = load_checkpoint(Path(made.output_folder, FINAL))
    assert_same(final["network_weights"], undisturbed["network_weights"])
    for name in ("train_losses", "val_losses", "ema_fg_dice", "lrs"):
        np.testing.assert_allclose(final["logging"][name], undisturbed["logging"][name], rtol=1e-6, err_msg=name)
    starts, ends = (final["logging"][f"epoch_{edge}_timestamps"] for edge in ("start", "end"))
    assert all(0 < end - start < 60 for start, end in zip(starts, ends, strict=True))
    assert {file.name for file in Path(made.output_folder).glob("checkpoint*")} == {FINAL, BEST}


def test_minutes_and_epochs_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
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
    for text, expected in (("", []), ("1epochs", [4]), ("2.5min", [3, 6]), ("1epochs,2.5min", [3, 4, 7])):
        monkeypatch.setenv("MASKSAM_SAVE_EVERY", text)
        saved.clear()
        made = trainer()
        assert (made.save_every, made.save_minutes) == ((50, 30) if not text else (made.save_every, made.save_minutes))
        made.run_training()
        assert [iteration for name, iteration in saved if name == LATEST] == expected, text
        assert (FINAL, 8) in saved


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(undisturbed: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKSAM_SAVE_EVERY", "0.00001min")  # after each iteration
        patch.setattr(Short, "stop_after", 3)
        made = trainer()
        with pytest.raises(SystemExit):
            made.run_training()
    folder = Path(made.output_folder)
    latest = folder / LATEST
    assert load_checkpoint(folder / PREVIOUS)["masksam_within_epoch"]["outputs"]["loss"].shape == (2,)
    latest.write_bytes(latest.read_bytes()[:-1000])
    (folder / f"{LATEST}.part").write_bytes(b"left by a kill")
    made = trainer(go_on=True)
    assert f"{latest} is damaged" in log(made) and "0 epochs are done, and 2 iterations of the next" in log(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Short, "stop_after", 4)
        with pytest.raises(SystemExit):
            made.run_training()
    assert not list(folder.glob("*.part"))
    assert len(load_checkpoint(folder / PREVIOUS)["masksam_within_epoch"]["outputs"]["loss"]) == 2, (
        "not the damaged one"
    )
    latest.unlink()  # and where nnU-Net would find nothing at all, and start anew
    made = trainer(go_on=True)
    assert made.current_epoch == 0
    made.run_training()
    assert_same(load_checkpoint(folder / FINAL)["network_weights"], undisturbed["network_weights"])
    (folder / FINAL).write_bytes(b"")
    validated = Short(plain_plans(), "3d_fullres", 0, dataset_json(), CPU)
    with pytest.raises(TrainingError, match="checkpoint_final"):
        maybe_load_checkpoint(validated, False, True)
    assert "checkpoint_final.pth is damaged" in log(trainer(go_on=True)), "the best one is whole"
    (folder / BEST).write_bytes(b"")
    with pytest.raises(TrainingError, match="checkpoint_best"):
        trainer(go_on=True)


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
        with pytest.raises(TrainingError, match=rf"{folder / FINAL}.*{LATEST}"):
            made.run_training()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = log(made)
    for name in (LATEST, BEST):
        assert f"WARNING: cannot write {folder / name}" in said
    assert said.count("The training continues.") >= 2
    assert load_checkpoint(folder / LATEST)["current_epoch"] == 1
    assert not list(folder.glob("*.part"))
    again = trainer(go_on=True)
    assert again.current_epoch == 1
    again.run_training()
    assert load_checkpoint(folder / FINAL)["current_epoch"] == 3


def test_the_last_save_takes_the_room_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    folder = Path(made.output_folder)
    made.on_epoch_start()
    for _ in range(2):
        made.save_checkpoint(str(folder / LATEST))
    write = torch.save

    def room_for_two(content: object, file: str) -> None:
        if (folder / PREVIOUS).exists():
            raise OSError(28, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", room_for_two)
    made.save(folder / LATEST, must=False)
    assert (folder / PREVIOUS).exists() and "No space left on device" in log(made)
    made.save_checkpoint(str(folder / FINAL))
    assert {file.name for file in folder.glob("checkpoint*")} == {FINAL, LATEST}


# ---- the command -----------------------------------------------------------------------------------------------------


class RankEnded(Exception):
    """As PyTorch's ``ProcessExitedException``."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"process 0 terminated with exit code {exit_code}")
        self.exit_code = exit_code


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SystemExit(75), 75, ""),
        (RankEnded(75), 75, ""),
        (TrainingError("cannot write it"), 1, "error: cannot write it\n"),
        (CheckpointError("refused it"), 1, "error: refused it\n"),
    ],
)
def test_masksam_train_hands_on_how_it_ended(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        raise error

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", end)
    monkeypatch.setattr("masksam_nnunet.cli.train.require_trainable", lambda asked: None)
    monkeypatch.setattr(sys, "argv", ["masksam"])
    monkeypatch.setenv(EXT_TRAINER, "")
    options = ["-tr", "MaskSAMTrainer", "-device", "cpu"]
    result = CliRunner().invoke(cli.app, ["train", "4", "3d_fullres", "0", *options])
    assert (result.exit_code, result.stderr) == (status, said)


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
    said = log(made)
    assert said.count("1 of 4 iterations of this epoch made no step") == 2
    assert said.count("WARNING: no step") == 2, "each is told of once"
    for part in (
        "iteration 5, learning rate 0.00",
        "loss nan (terms that are not finite: class nan",
        "image_encoder nan",
    ):
        assert part in said
    assert "cases: case_a, case_b; the input holds values that are not finite in case_b" in said


def test_too_many_in_a_row_end_it_with_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_MAX_SKIPPED", "3")
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", "1epochs")
    monkeypatch.setattr(Short, "poison", (1, 2, 4, 5, 6))
    made = trainer()
    with pytest.raises(TrainingError, match=r"3 iterations in a row, in epoch 1.*\n.*iteration 4.*case_b"):
        made.run_training()
    assert made.iteration == 7
    assert load_checkpoint(Path(made.output_folder, LATEST))["current_epoch"] == 1, "the last good one is kept"


def test_a_large_share_of_an_epoch_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masksam_nnunet.trainers.masksam.FEWEST_SKIPPED", 2)
    monkeypatch.setattr(Short, "poison", (0, 1, 3))
    with pytest.raises(TrainingError, match="3 of 4 iterations"):
        trainer().run_training()


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
    assert "all its terms are finite" in log(made)
    parts = log(made).split("norms of the gradient: ")[1].split(";")[0].split(", ")
    assert {part.split()[0] for part in parts if part.split()[1] in ("inf", "nan")} == {"mask_head"}
    assert made.train_step(next(Loader(made)))["skipped"] == 0


# ---- time budgets ----------------------------------------------------------------------------------------------------


def test_a_budget_goes_on_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 seconds in epochs of 6, each iteration 2 of them by this clock."""
    monkeypatch.setenv("MASKSAM_BUDGET_MINUTES", "1")
    clock = [0.0]
    monkeypatch.setattr("masksam_nnunet.trainers.time_budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(MaskSAMTrainer_tiny_budget, "on_train_start", lambda self: None)
    step = MaskSAMTrainer_tiny_budget.train_step
    steps: list[tuple[int, int, float]] = []

    def timed_step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = step(self, batch)
        clock[0] += 2
        steps.append((self.current_epoch, self.iterations_done, self.elapsed))
        if len(steps) == 5:
            signal.raise_signal(signal.SIGUSR2)
        return outputs

    monkeypatch.setattr(MaskSAMTrainer_tiny_budget, "train_step", timed_step)

    def make(go_on: bool) -> Any:
        made = trainer(MaskSAMTrainer_tiny_budget, go_on)
        made.dataloader_train = made.dataloader_val = Loader(made)
        made.logger.plot_progress_png = lambda folder: None
        return made

    with pytest.raises(SystemExit) as left:
        make(False).run_training()
    assert left.value.code == 75 and steps[-1] == (1, 5, 10.0)
    clock[0] = 10_000.0  # when the job is started again
    made = make(True)
    made.run_training()
    assert steps == [(number // 3, number + 1, 2.0 * (number + 1)) for number in range(30)]
    assert len(made.logger.get_value("train_losses", step=None)) == 10
    assert made.iteration == made.iterations_done == 30, "of the warm-up too"
