"""Places that cannot be written or read, and full disks: an error that names the place, nothing half written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from challenge_replicas import build_msd
from kinds_of_data import Kind
from plain_plans import simple_cost
from small_sam import expect_release
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.environment import EXT_TRAINER
from masksam_nnunet.plans import sizing

KIND = Kind(49, "Places", [(4, 12, 10)] * 10, {"background": 0, "a": 1}, (1,))
NOBODY = 65534


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """nnU-Net's folders where nobody may look; pytest's own are closed to other users."""
    root = Path(tempfile.mkdtemp(prefix="masksam_places_"))
    root.chmod(0o755)
    for name in ("nnUNet_preprocessed", "nnUNet_results", "cache"):
        (root / name).mkdir()
    KIND.write(root / "nnUNet_raw")
    KIND.write_fingerprint(root / "nnUNet_preprocessed")
    yield root
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(place / name))
    monkeypatch.setattr(sizing, "training_cost", simple_cost)
    monkeypatch.setenv("MASKSAM_CACHE", str(place / "cache"))
    monkeypatch.delenv("MASKSAM_WEIGHTS", raising=False)
    # Set, then deleted: so that what a command writes there is undone after the test.
    monkeypatch.setenv(EXT_TRAINER, "")
    monkeypatch.delenv(EXT_TRAINER)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result, result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.name.endswith(".lock"))


@contextlib.contextmanager
def as_nobody(closed: Path, mode: int = 0o555) -> Iterator[None]:
    """Without root's right to write and read everything; ``closed`` is not writable, or not readable at all."""
    before, user = closed.stat().st_mode, os.geteuid()
    closed.chmod(mode)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        closed.chmod(before)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files end at ``size`` bytes, with an error as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


PLAN = ("plan", "-d", "49", "--backbone", "tiny", "-c", "3d_fullres")


@pytest.fixture
def sam(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that counts as SAM's, and an empty cache."""
    content = bytes(100_000)
    expect_release(monkeypatch, "vit_b", content)
    file = place / "sam.pth"
    file.write_bytes(content)
    yield file
    for path in (place / "cache").iterdir():
        path.unlink()


def test_commands_work_where_they_may_write(place: Path, sam: Path) -> None:
    """Else what follows would show nothing; it also imports all that nobody could not."""
    folder = place / "nnUNet_preprocessed" / KIND.dataset
    assert run(*PLAN).exit_code == 0 and (folder / "MaskSAMPlans.json").is_file()
    assert run("check", "-d", "49").exit_code == 0
    assert run("weights", "vit_b", "--from", sam).exit_code == 0
    assert run("split", "-d", "49", "--group", "case_0([0-9])").exit_code == 1  # groups nothing
    for name in ("MaskSAMPlans.json", "dataset.json"):
        (folder / name).unlink()


def test_folders_that_are_not_writable(place: Path, sam: Path) -> None:
    folder, source = place / "nnUNet_preprocessed" / KIND.dataset, place / "source"
    build_msd(source)
    before = files(place)
    split = ("split", "-d", "49", "--folds", "2", "--group", "case_(0)[0-4]|(c)ase_0[5-9]")
    convert = ("convert", "msd", next(source.iterdir()), "-d", "50", "--processes", "1")
    for command, closed, named in (
        (PLAN, folder, str(folder)),
        (split, folder, "splits_final.json"),
        (convert, place / "nnUNet_raw", "nnUNet_raw"),
        (("weights", "vit_b", "--from", sam), place / "cache", "MASKSAM_CACHE"),
    ):
        with as_nobody(closed):
            message = refused(*command)
        assert named in message and "Permission denied" in message
        assert files(place) == before


def test_a_raw_file_that_is_not_readable(place: Path) -> None:
    file = place / "nnUNet_raw" / KIND.dataset / "labelsTr" / "case_00.nii.gz"
    with as_nobody(file, 0):
        result = run("check", "-d", "49")
    assert result.exit_code == 1 and str(file) in result.stderr and "Permission denied" in result.stderr
    description = place / "nnUNet_raw" / KIND.dataset / "dataset.json"
    with as_nobody(description, 0):
        assert "dataset.json" in refused("check", "-d", "49")


def test_a_full_disk_leaves_no_half_plans(place: Path) -> None:
    folder = place / "nnUNet_preprocessed" / KIND.dataset
    assert run(*PLAN).exit_code == 0
    earlier = {path: path.read_bytes() for path in files(folder) if path.is_file()}
    with small_disk(1000):
        message = refused(*PLAN, "--gpu-memory", "12")
    assert str(folder) in message and "File too large" in message
    assert {path: path.read_bytes() for path in files(folder) if path.is_file()} == earlier


def test_a_full_disk_leaves_no_half_checkpoint(place: Path, sam: Path) -> None:
    with small_disk(1000):
        assert "File too large" in refused("weights", "vit_b", "--from", sam)
    assert files(place / "cache") == []


@pytest.mark.parametrize("out", ["file", "file/inside"])
def test_files_in_place_of_folders(place: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"--out {tmp_path / out}" in refused("demo", "--out", tmp_path / out)
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / out))
    (tmp_path / "sam.pth").write_text("x")
    assert str(tmp_path / out) in refused("weights", "vit_b", "--from", tmp_path / "sam.pth")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / out))
    assert f"nnUNet_raw = {tmp_path / out}" in refused("plan", "-d", "49")
    assert (tmp_path / "file").read_text() == "mine"
