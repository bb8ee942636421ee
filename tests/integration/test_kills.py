"""Trainings that are killed, asked to leave, or find their newest checkpoint damaged, and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from commands import Command, prepared
from nnunet_workspace import Dataset, Workspace

from masksam_nnunet.checkpoints import load_checkpoint

TRAINER = "WatchedMaskSAM"
PATCH = [8, 16, 16]
WAIT = 300.0  # seconds, on a machine that others use too


@pytest.fixture(scope="module", autouse=True)
def small_patch(workspace: Workspace, dataset: Dataset) -> Iterator[None]:
    with workspace.plans(dataset.name, patch_size=PATCH):
        yield


SETTINGS = {"TEST_EPOCHS": "2", "TEST_ITERATIONS": "8", "MASKSAM_SAVE_EVERY": "1epochs,0.01min"}


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training that nothing happened to ends with."""
    fold = Fold(workspace, tmp_path_factory.mktemp("undisturbed") / "fold", SETTINGS)
    assert fold.start().wait() == 0, fold.log.read_text()[-4000:]
    return fold.final()


@dataclass
class Fold:
    """One training, in as many parts as it takes."""

    workspace: Workspace
    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.log, self.ledger = self.root / "log.txt", self.root / "ledger"

    @property
    def folder(self) -> Path:
        return next((self.root / "results").glob("*/*/fold_0"))

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self.ledger.read_text().splitlines() if self.ledger.is_file() else []
        return [json.loads(line) for line in lines]

    def start(self, **environment: str) -> Command:
        own = {"nnUNet_results": str(self.root / "results"), "TEST_LEDGER": str(self.ledger)}
        # --c, as a script gives that cannot know whether it is the first time
        command = ("nnUNetv2_train", "4", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu", "--c")
        all_settings = {"nnUNet_n_proc_DA": "0"} | own | self.environment | environment
        return prepared().start(command, self.log, self.workspace.environment | all_settings)

    def wait_for(self, event: str, count: int = 1, after: int = 0) -> dict[str, Any]:
        """The ``count``-th such event after the first ``after`` events of all."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            found = [entry for entry in self.events[after:] if entry["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.02)
        raise AssertionError(f"no {event}:\n{self.log.read_text()[-4000:]}")

    def final(self) -> dict[str, Any]:
        return load_checkpoint(self.folder / "checkpoint_final.pth")


def test_signals_and_kills_change_nothing(workspace: Workspace, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Batches are drawn by the number of the iteration here, so the very same weights must come out."""
    fold = Fold(workspace, tmp_path / "disturbed", SETTINGS)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        before = len(fold.events)
        training = fold.start(TEST_STEP_SECONDS="0.3", MASKSAM_SAVE_EVERY="50epochs")
        fold.wait_for("step", 2, before)
        os.kill(training.pid, number)
        os.kill(training.pid, number)  # twice at a time is once
        assert training.wait() == 75, fold.log.read_text()[-4000:]
        assert f"Ended by {number.name}" in fold.log.read_text()
        steps = [entry["iteration"] for entry in fold.events if entry["event"] == "step"]
        assert steps == list(range(len(steps))), "each iteration once"
        assert fold.events[-1] == {"event": "saved", "iteration": len(steps), "file": "checkpoint_latest.pth"}

    draw = random.Random(1)
    for _ in range(2):  # SIGKILL at random moments, some steps and a random part of a step after each start
        before = len(fold.events)
        saved = [e["iteration"] for e in fold.events if e["event"] == "saved" and "latest" in e["file"]]
        training = fold.start()
        started = fold.wait_for("start", after=before)
        assert started["iteration"] >= max(saved), "what had been saved was lost"
        steps, first = draw.randint(1, 4), time.monotonic()
        fold.wait_for("step", steps, before)
        time.sleep(draw.random() * (time.monotonic() - first) / steps)
        os.kill(training.pid, signal.SIGKILL)
        assert training.wait() == -signal.SIGKILL

    assert fold.start().wait() == 0, fold.log.read_text()[-4000:]
    final = fold.final()
    assert {int(state["step"]) for state in final["optimizer_state"]["state"].values()} == {16}, "each iteration once"
    for name, value in final["network_weights"].items():
        assert torch.equal(value, undisturbed["network_weights"][name]), name
    for name in ("train_losses", "lrs"):
        np.testing.assert_allclose(final["logging"][name], undisturbed["logging"][name], rtol=1e-6)
    assert {len(values) for values in final["logging"].values()} == {2}
    assert {file.name for file in fold.folder.glob("checkpoint*")} == {"checkpoint_best.pth", "checkpoint_final.pth"}


def test_a_dead_worker_is_told_of_and_what_was_trained_is_saved(workspace: Workspace, tmp_path: Path) -> None:
    settings = {"TEST_EPOCHS": "1", "TEST_ITERATIONS": "40", "nnUNet_n_proc_DA": "1"}
    fold = Fold(workspace, tmp_path / "worker", settings)
    training = fold.start(TEST_STEP_SECONDS="0.2")
    (worker,) = fold.wait_for("start")["workers"]
    fold.wait_for("step", 3)
    os.kill(worker, signal.SIGKILL)
    assert training.wait() == 1
    log = fold.log.read_text()
    assert "TrainingError: 1 of 1 data loading workers ended by SIGKILL" in log
    saved = fold.events[-1]
    assert saved["event"] == "saved" and saved["iteration"] >= 3

    before = len(fold.events)
    training = fold.start(TEST_STEP_SECONDS="0.2")
    started = fold.wait_for("start", after=before)
    assert started["iteration"] == saved["iteration"]
    fold.wait_for("step", 1, before)
    os.kill(training.pid, signal.SIGKILL)  # and no worker of a killed training stays
    training.wait()
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in started["workers"]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in started["workers"] if psutil.pid_exists(pid)]
