"""Checkpoint files: whole or not there, and found when the newest is damaged."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
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
from masksam_nnunet.trainers.checkpoint_files import SaveInterval


def content(epoch: int, size: int = 1000) -> dict[str, Any]:
    return {"network_weights": {"w": torch.full((size,), float(epoch))}, "current_epoch": epoch}


def epoch_of(file: Path) -> int:
    return int(files.exactly(file)["current_epoch"])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_the_one_before_is_kept_without_a_copy(tmp_path: Path) -> None:
    latest, previous = tmp_path / files.LATEST, tmp_path / files.PREVIOUS
    for epoch in (1, 2, 3):
        files.write(content(epoch), latest, previous)
        assert latest.stat().st_nlink == 1
    assert (epoch_of(latest), epoch_of(previous)) == (3, 2)
    os.link(latest, tmp_path / "again")
    os.replace(tmp_path / "again", previous)  # a kill between the second name and the new file
    files.write(content(4), latest, previous)
    assert (epoch_of(latest), epoch_of(previous)) == (4, 3)
    assert {file.name for file in tmp_path.iterdir()} == {files.LATEST, files.PREVIOUS}


def test_without_links_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        files.write(content(epoch), tmp_path / files.LATEST, tmp_path / files.PREVIOUS)
    assert [epoch_of(tmp_path / name) for name in (files.LATEST, files.PREVIOUS)] == [2, 1]


def test_a_full_disk_leaves_the_earlier_ones_and_nothing_else(tmp_path: Path) -> None:
    latest, previous = tmp_path / files.LATEST, tmp_path / files.PREVIOUS
    for epoch in (1, 2):
        files.write(content(epoch), latest, previous)
    for room in (0, 10_000, 390_000):  # in the first record, in the tensor, near its end
        with file_size_limit(room), pytest.raises(TrainingError, match=str(latest)):
            files.write(content(3, 100_000), latest, previous)
    assert (epoch_of(latest), epoch_of(previous)) == (2, 1)
    assert {file.name for file in tmp_path.iterdir()} == {files.LATEST, files.PREVIOUS}


def test_an_error_that_shows_only_when_it_reaches_the_disk_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        files.write(content(1), tmp_path / files.LATEST)
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch
from pathlib import Path
sys.modules["nnunetv2"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("checkpoint_files", sys.argv[1])
files = importlib.util.module_from_spec(spec); sys.modules["checkpoint_files"] = files; spec.loader.exec_module(files)
folder = Path(sys.argv[2])
for epoch in range(1, 10**6):
    weights = {"w": torch.full((200_000,), float(epoch))}
    files.write({"network_weights": weights, "current_epoch": epoch}, folder / files.LATEST, folder / files.PREVIOUS)
    print(epoch, flush=True)
"""


def test_kills_at_any_moment_of_writing_leave_a_whole_one(tmp_path: Path) -> None:
    """A process that does nothing but write, stopped 12 times to look at what a kill would have left."""
    draw = random.Random(3)
    script = [sys.executable, "-c", WRITER, str(files.__file__), str(tmp_path)]
    within = 0
    writer = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(12):
        for _ in range(2):
            said = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGSTOP)
        within += any(tmp_path.glob("*.part"))
        found = files.newest_whole(tmp_path)
        assert found.content["current_epoch"] >= said and not found.damaged
        assert (found.content["network_weights"]["w"] == found.content["current_epoch"]).all()
        os.kill(writer.pid, signal.SIGCONT)
        time.sleep(0.01 * draw.random())
    assert within, "it was never stopped in the middle"
    writer.kill()
    writer.wait()
    found = files.newest_whole(tmp_path)
    assert not found.damaged
    files.remove_partial(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {files.LATEST, files.PREVIOUS}


def spoil(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "one bit":
        data[data.find(torch.full((8,), float(files.exactly(file)["current_epoch"])).numpy().tobytes()) + 100] ^= 4
    elif how == "empty":
        data.clear()
    else:
        data[:] = b"\\0" * len(data)
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut", "one bit", "empty", "zeros"])
def test_what_is_damaged_is_named_and_the_one_before_is_taken(tmp_path: Path, how: str) -> None:
    for age, (name, epoch) in enumerate([(files.LATEST, 30), (files.PREVIOUS, 20), (files.BEST, 10)]):
        files.write(content(epoch), tmp_path / name)
        then = time.time() - 600 * age
        os.utime(tmp_path / name, (then, then))
    spoil(tmp_path / files.LATEST, how)
    found = files.newest_whole(tmp_path)
    assert found.file.name == files.PREVIOUS and found.content["current_epoch"] == 20
    (line,) = found.damaged
    for part in (files.LATEST, files.PREVIOUS, "epoch 20", "10 minutes"):
        assert part in line
    spoil(tmp_path / files.PREVIOUS, how)
    assert files.newest_whole(tmp_path).file.name == files.BEST
    assert len(files.newest_whole(tmp_path).damaged) == 2
    spoil(tmp_path / files.BEST, how)
    with pytest.raises(TrainingError, match=r"latest.*previous.*best"):
        files.newest_whole(tmp_path)
    with pytest.raises(TrainingError, match="checkpoint_best"):
        files.exactly(tmp_path / files.BEST)


def test_the_final_one_comes_first_and_code_is_never_run(tmp_path: Path) -> None:
    files.write(content(30), tmp_path / files.LATEST)
    files.write(content(40), tmp_path / files.FINAL)
    assert files.newest_whole(tmp_path).content["current_epoch"] == 40
    torch.save({"network_weights": {}, "x": os.getcwd}, tmp_path / files.FINAL)
    with pytest.raises(CheckpointError, match="getcwd"):  # whole, and not to be passed over
        files.newest_whole(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SaveInterval(50, 30)),
        ("10epochs", SaveInterval(10)),
        ("1epoch", SaveInterval(1)),
        (" 15min ", SaveInterval(None, 15)),
        ("0.5 minutes, 3 epochs", SaveInterval(3, 0.5)),
    ],
)
def test_how_often_to_save(text: str, expected: SaveInterval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", text)
    assert SaveInterval.chosen(SaveInterval(50, 30)) == expected


@pytest.mark.parametrize("text", ["10", "0epochs", "1.5epochs", "-1min", "5min,6min", "10epochs|5min", "often", "0min"])
def test_other_save_intervals_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSAM_SAVE_EVERY", text)
    with pytest.raises(ConfigError, match="MASKSAM_SAVE_EVERY"):
        SaveInterval.chosen(SaveInterval(50, 30))
