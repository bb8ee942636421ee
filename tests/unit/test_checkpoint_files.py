"""Checkpoint files: whole or not there, and found when the newest is damaged."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from masksam_nnunet.config import ConfigError
from masksam_nnunet.errors import CheckpointError, TrainingError
from masksam_nnunet.trainers import checkpoint_files as files
from masksam_nnunet.trainers.checkpoint_files import BEST, FINAL, LATEST, candidates, load_whole, save_interval


def content(epoch: int, size: int = 1000) -> dict[str, Any]:
    return {"network_weights": {"w": torch.full((size,), float(epoch))}, "current_epoch": epoch}


def epoch_of(file: Path) -> int:
    return int(load_whole([file], pytest.fail)[1]["current_epoch"])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_full_disk_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latest = tmp_path / LATEST
    files.write(content(2), latest)
    for room in (0, 10_000, 390_000):  # in the first record, in the tensor, near its end
        with file_size_limit(room), pytest.raises(TrainingError, match=str(latest)):
            files.write(content(3, 100_000), latest)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # an error that shows only when it reaches the disk
    with pytest.raises(TrainingError, match="No space left on device"):
        files.write(content(3), latest)
    assert epoch_of(latest) == 2
    assert [file.name for file in tmp_path.iterdir()] == [LATEST]


def test_kills_at_any_moment_of_writing_leave_a_whole_one(tmp_path: Path) -> None:
    """A process that does nothing but write, stopped 12 times to look at what a kill would have left."""
    draw = random.Random(3)
    latest = tmp_path / LATEST
    files.write(content(0), latest)
    writer = os.fork()
    if writer == 0:
        torch.set_num_threads(1)
        for epoch in range(1, 10**6):
            files.write(content(epoch, 200_000), latest)
    within, last = 0, 0
    try:
        for _ in range(12):
            time.sleep(0.02 + 0.01 * draw.random())
            os.kill(writer, signal.SIGSTOP)
            within += len(list(tmp_path.iterdir())) > 1
            whole = load_whole([latest], pytest.fail)[1]
            assert whole["current_epoch"] >= last
            assert (whole["network_weights"]["w"] == whole["current_epoch"]).all()
            last = whole["current_epoch"]
            os.kill(writer, signal.SIGCONT)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert within and last, "it was never stopped in the middle, or wrote nothing"
    files.remove_drafts(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [LATEST]


def spoil(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "one bit":
        data[data.find(torch.full((8,), float(epoch_of(file))).numpy().tobytes()) + 100] ^= 4
    else:
        data[:] = b"\0" * (0 if how == "empty" else len(data))
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut", "one bit", "empty", "zeros"])
def test_what_is_damaged_is_named_and_another_is_taken(tmp_path: Path, how: str) -> None:
    final, latest, best = (tmp_path / name for name in (FINAL, LATEST, BEST))
    files.write(content(30), latest)
    files.write(content(10), best)
    spoil(latest, how)
    said: list[str] = []
    file, found = load_whole([final, latest, best], said.append)
    assert file == best and found["current_epoch"] == 10
    (line,) = said
    assert str(latest) in line and best.name in line and "epoch 10" in line
    spoil(best, how)
    with pytest.raises(TrainingError, match=r"latest.*best"):
        load_whole([final, latest, best], pytest.fail)


def test_a_new_training_comes_before_the_final_checkpoint_of_an_earlier_one(tmp_path: Path) -> None:
    final, latest, best = (tmp_path / name for name in (FINAL, LATEST, BEST))
    files.write(content(40), final)
    files.write(content(3), latest)
    os.utime(final, (1, 1))
    assert candidates(tmp_path) == [latest, best, final]
    os.utime(latest, (0, 0))
    assert candidates(tmp_path) == [final, latest, best]


def test_the_final_one_comes_first_and_code_is_never_run(tmp_path: Path) -> None:
    choice = candidates(tmp_path)
    files.write(content(40), choice[0])
    files.write(content(30), choice[1])
    assert load_whole(choice, pytest.fail)[1]["current_epoch"] == 40
    torch.save({"network_weights": {}, "x": os.getcwd}, choice[0])
    with pytest.raises(CheckpointError, match="getcwd"):  # whole, and not to be passed over
        load_whole(choice, pytest.fail)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (50, 30)),
        ("10epochs", (10, None)),
        (" 15min ", (None, 15)),
        ("0.5 minutes, 3 epochs", (3, 0.5)),
        *((text, None) for text in ("10", "0epochs", "1.5epochs", "-1min", "5min,6min", "10epochs|5min", "0min")),
    ],
)
def test_how_often_to_save(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", text)
    if expected is not None:
        assert save_interval((50, 30)) == expected
    else:
        with pytest.raises(ConfigError, match="MASKSAM_SAVE_EVERY"):
            save_interval((50, 30))
