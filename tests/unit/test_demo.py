"""What the demo does around nnU-Net: arguments, its folder, raw data, and running commands."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from masksam_nnunet.benchmarks import commands
from masksam_nnunet.benchmarks.demo import run_demo
from masksam_nnunet.benchmarks.demo_end import next_commands
from masksam_nnunet.benchmarks.demo_folder import DemoFolder, DemoSettings
from masksam_nnunet.errors import DataError, DemoError
from masksam_nnunet.inference.phantoms import write_phantom_dataset
from masksam_nnunet.plans.raw_data import place_raw_dataset, read_raw_dataset

SETTINGS = DemoSettings("phantoms", 2.0, 2, 0, 0, "cpu")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_phantom_dataset(tmp_path / "raw", num_cases=5, num_test_cases=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.0}, "--minutes must be a positive number, not 0.0"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"fold": 5}, "--fold must be from 0 to 4, not 5"),
        ({"fold": -1}, "--fold"),
        ({"seed": -1}, "--seed"),
        ({"data": Path("no", "such", "Dataset001_X")}, "there is no such folder"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"data": None, "minutes": 1.0, "batch_size": 2, "fold": 0, "seed": 0} | change
    with pytest.raises(DataError, match=message):
        run_demo(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_folder_is_taken_up_by_the_same_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = DemoFolder.open(out, SETTINGS)
    assert not first.take("preprocess")
    first.finish("preprocess")
    again = DemoFolder.open(out, SETTINGS)
    assert again.take("preprocess") and not again.take("train")
    assert again.reused == ["preprocess"]
    with pytest.raises(DemoError, match=r"other settings: minutes \(then 2.0, now 3.0\)"):
        DemoFolder.open(out, DemoSettings("phantoms", 3.0, 2, 0, 0, "cpu"))
    (out / "demo.json").write_text("{")
    with pytest.raises(DemoError, match="damaged"):
        DemoFolder.open(out, SETTINGS)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not ours")
    with pytest.raises(DemoError, match="is not empty and holds no demo"):
        DemoFolder.open(tmp_path, SETTINGS)
    with pytest.raises(DemoError, match="is a file"):
        DemoFolder.open(tmp_path / "letter.txt", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def _drop(key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "dataset.json").read_text())
        del content[key]
        (folder / "dataset.json").write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda f: (f / "dataset.json").write_text("{,}"), "dataset.json is not JSON"),
        (_drop("labels"), "dataset.json lacks labels"),
        (lambda f: (f / "labelsTr").rename(f / "labels"), "the folder labelsTr is missing"),
        (lambda f: (f / "labelsTr" / "phantom_001.nii.gz").unlink(), "'phantom_001' lacks phantom_001.nii.gz"),
        (lambda f: (f / "imagesTr" / "phantom_001_0000.nii.gz").unlink(), "4 training cases"),
        (
            lambda f: (f / "imagesTr" / "phantom_001_0001.nii.gz").write_bytes(b""),
            "case 'phantom_001' has 2 image files, others have 1, and channel_names in dataset.json has 1",
        ),
    ],
)
def test_unusable_raw_data(raw: Path, damage: Callable[[Path], object], message: str) -> None:
    assert len(read_raw_dataset(raw).images) == 5
    damage(raw)
    with pytest.raises(DataError, match=message):
        read_raw_dataset(raw)


@pytest.mark.parametrize("name", ["Hippocampus", "Dataset4_Hippocampus", "Dataset004", "Dataset004_", "dataset004_A"])
def test_folder_names_that_nnunet_does_not_find(raw: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"DatasetXXX_Name.* not '{name}'"):
        read_raw_dataset(raw.rename(raw.with_name(name)))


def test_dataset_is_linked_by_its_own_name(raw: Path, tmp_path: Path) -> None:
    dataset = read_raw_dataset(raw)
    assert (dataset.name, dataset.number) == (raw.name, "901")
    placed = place_raw_dataset(dataset, tmp_path / "out")
    assert placed.folder == tmp_path / "out" / raw.name and placed.folder.is_symlink()
    assert place_raw_dataset(dataset, tmp_path / "out") == placed
    alias = tmp_path / "Dataset007_Alias"
    alias.symlink_to(raw)
    assert read_raw_dataset(alias).number == "7"


def test_next_commands_predict_with_both_and_ensemble(raw: Path) -> None:
    lines = next_commands(read_raw_dataset(raw), "3d_fullres", 0, ["A", "B"], "cpu")
    assert lines[0] == 'export nnUNet_raw="$OUT/nnUNet_raw"' and lines[3] == 'eval "$(masksam env)"'
    assert "imagesTr" in lines[4]  # no test images
    assert [line.split()[0] for line in lines[4:]] == ["nnUNetv2_predict", "nnUNetv2_predict", "nnUNetv2_ensemble"]
    (raw / "imagesTs" / "x_0000.nii.gz").write_bytes(b"")
    assert "imagesTs" in next_commands(read_raw_dataset(raw), "3d_fullres", 0, ["A"], "cpu")[4]


def test_nnunet_commands_get_the_callers_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_extTrainer", "elsewhere")
    environment = commands.nnunet_environment(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert [environment[f"nnUNet_{name}"] for name in ("raw", "preprocessed", "results")] == [
        str(tmp_path / name) for name in "abc"
    ]
    assert "nnUNet_n_proc_DA" not in environment  # planning fails with 0
    assert Path(environment["nnUNet_extTrainer"].split(os.pathsep)[0]).name == "nnunet_ext"
    assert os.environ["nnUNet_extTrainer"] == "elsewhere"


def test_a_failing_command_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_launcher", lambda command: "import sys; print('the reason'); sys.exit(3)")
    log = tmp_path / "logs" / "x.log"
    with pytest.raises(DemoError, match=r"(?s)nnUNetv2_train 1 '2 d'\nended with exit status 3.*x\.log.*the reason"):
        commands.run_nnunet("nnUNetv2_train", ["1", "2 d"], dict(os.environ), log)
    assert log.read_text().splitlines() == ["$ nnUNetv2_train 1 '2 d'", "the reason"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_command_and_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, error: type[BaseException]
) -> None:
    ids = tmp_path / "ids"
    code = (
        "import os, pathlib, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({str(ids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}');"
        "time.sleep(60)"
    )
    monkeypatch.setattr(commands, "_launcher", lambda command: code)

    def interrupt() -> None:
        if ids.is_file() and ids.read_text():
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGTERM)
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            commands.run_nnunet("nnUNetv2_train", [], dict(os.environ), tmp_path / "log", poll=interrupt)
    finally:
        signal.signal(signal.SIGINT, inherited)
    started = [int(number) for number in ids.read_text().split()]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(_runs, started)):
        time.sleep(0.1)
    assert not any(map(_runs, started))
    assert signal.getsignal(signal.SIGTERM) is before


def _runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_unknown_command_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=f"nnUNetv2_dance is not installed in {sys.executable}"):
        commands.run_nnunet("nnUNetv2_dance", [], {}, tmp_path / "log")
