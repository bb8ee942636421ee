"""What masksam train passes to nnU-Net, and what it refuses before nnU-Net makes a folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from nnunetv2.run import run_training as nnunet
from plain_plans import plain_plans
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.cli.train import training_parser
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import WeightsError

NAME = "Dataset052_Asked"
RIGHT = "52 3d_fullres 0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned and preprocessed dataset of five empty cases, as far as it is looked at."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv(EXT_TRAINER, "")
    monkeypatch.setattr("sys.argv", ["masksam"])
    found = tmp_path / "nnUNet_preprocessed" / NAME
    (found / "hand_data").mkdir(parents=True)
    (found / "nnUNetPlans.json").write_text(json.dumps(plain_plans() | {"dataset_name": NAME}))
    (found / "dataset.json").write_text("{}")
    for number in range(5):
        (found / "hand_data" / f"case_{number}.b2nd").touch()
        (found / "hand_data" / f"case_{number}.pkl").touch()
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that nnU-Net would train by."""
    lines: list[list[str]] = []
    monkeypatch.setattr(nnunet, "run_training", lambda *_, **__: lines.append(list(sys.argv)))
    return lines


def train(words: str, device: str = "-device cpu") -> Result:
    return CliRunner().invoke(app, ["train", *words.split(), *device.split()])


def refused(words: str, device: str = "-device cpu") -> str:
    result = train(words, device)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result, result.exception)
    assert "Traceback" not in result.stderr
    assert not any(Path(os.environ["nnUNet_results"]).iterdir())
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (f"{RIGHT} --npz --c", "-tr MaskSAMTrainer"),
        (f"-tr=nnUNetTrainer {RIGHT}", ""),
        (f"{RIGHT} -t nnUNetTrainer", ""),
    ],
)
def test_what_is_right_is_passed_on(calls: list[list[str]], words: str, more: str) -> None:
    assert train(words).exit_code == 0
    assert calls == [["masksam train", *words.split(), "-device", "cpu", *more.split()]]
    assert os.environ[EXT_TRAINER] == str(trainer_folder())


def test_the_parser_is_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that is checked has the same arguments and defaults; -tr is known to differ."""
    theirs: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        theirs.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_training_entry()

    def described(parser: argparse.ArgumentParser) -> dict[str, object]:
        return {a.dest: (a.option_strings, a.default, a.nargs, a.type or str) for a in parser._actions}

    expected, found = described(theirs[0]), described(training_parser())
    assert expected.pop("help") and expected.pop("tr") != found.pop("tr")
    assert found == expected


@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_missing_folders_are_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name)
    result = train(RIGHT)
    assert result.exit_code == 1 and name in result.stderr


@pytest.mark.parametrize("device", ["", "-device cuda"])
def test_training_without_a_gpu_stops_at_once(device: str) -> None:
    assert "-device cuda" in refused(RIGHT, device)


class RankEnded(Exception):
    """As PyTorch's ``ProcessExitedException``."""

    exit_code = 75


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit(75), 75), (RankEnded(), 75), (WeightsError("no SAM checkpoint"), 1)]
)
def test_how_a_training_ended_is_handed_on(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(nnunet, "run_training", end)
    result = train(RIGHT)
    assert result.exit_code == status and isinstance(result.exception, SystemExit)
    assert result.stderr.endswith("error: no SAM checkpoint\n") == (status == 1)


def test_the_best_checkpoint_of_an_unfinished_training_is_validated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Trainer:
        output_folder = str(tmp_path)
        done: ClassVar[list[object]] = []

        def load_checkpoint(self, file: str) -> None:
            self.done.append(file)

        def perform_actual_validation(self, probabilities: bool) -> None:
            self.done.append(probabilities)

    monkeypatch.setattr(nnunet, "get_trainer_from_args", lambda *_, **__: Trainer())
    assert "checkpoint_best.pth" in refused(f"{RIGHT} --val --val_best --npz")
    (tmp_path / "checkpoint_best.pth").touch()
    assert train(f"{RIGHT} --val --val_best --npz").exit_code == 0
    assert Trainer.done == [str(tmp_path / "checkpoint_best.pth"), True]


def test_weights_of_another_network_are_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (file := tmp_path / "other.pth").touch()

    def load(*_: object, **__: object) -> None:
        assert 1 == 2, "The shape of the parameters of key stem.mix is not the same. Pretrained model: 1; yours: 2."

    monkeypatch.setattr(nnunet, "run_training", load)
    message = refused(f"{RIGHT} -pretrained_weights {file}")
    assert "-pretrained_weights" in message and "stem.mix" in message and "yours" not in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("77 3d_fullres 0", ["77", NAME]),
        ("Asked 3d_fullres 0", ["Asked", NAME]),
        ("52 3d_lowres 0", ["3d_lowres", "3d_fullres"]),
        (f"{RIGHT} -p MaskSAMPlans", ["MaskSAMPlans.json", "masksam plan -d 52"]),
        (f"{RIGHT} -tr MaskSAMTrainr", ["-tr MaskSAMTrainr"]),
        (f"{RIGHT} -pretrained_weights none.pth", ["-pretrained_weights none.pth"]),
        (f"{RIGHT} -p LitePlans", ["LitePlans.json", "nnUNetPlans"]),
        (f"{RIGHT} -num_gpus 2", ["-num_gpus 2", "-device cpu"]),
        ("52 3d_fullres five", ["fold five"]),
        ("52 3d_fullres 5", ["fold 5", "0 to 4"]),
    ],
)
def test_requests_that_are_refused(words: str, named: list[str]) -> None:
    message = refused(words)
    assert all(name in message for name in named), message
    if "-num_gpus" not in words:
        assert named[0] in refused(words, "-device cuda"), "a missing GPU hides it"


STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not preprocessed": (lambda folder: shutil.rmtree(folder / "hand_data"), "nnUNetv2_preprocess -d 52"),
    "plans cut off": (lambda folder: (folder / "nnUNetPlans.json").write_text('{"configurations": {'), "nnUNetPlans"),
    "no dataset.json": (lambda folder: (folder / "dataset.json").unlink(), "dataset.json"),
    "four cases": (lambda folder: (folder / "hand_data" / "case_4.b2nd").unlink(), "splits_final.json"),
    "one fold": (lambda folder: (folder / "splits_final.json").write_text("[]"), "splits_final.json"),
    "unknown cases": (
        lambda folder: (folder / "splits_final.json").write_text('[{"train": ["gone"], "val": []}]'),
        "gone",
    ),
    "two datasets": (lambda folder: (folder.parent / "Dataset052_Other").mkdir(), "Dataset052_Other"),
}


@pytest.mark.parametrize("state", STATES)
def test_states_that_cannot_be_trained_from(folder: Path, state: str) -> None:
    spoil, named = STATES[state]
    spoil(folder)
    assert named in refused(RIGHT)


def test_a_number_that_begins_anothers_is_told_apart_for_nnunet(folder: Path, calls: list[list[str]]) -> None:
    (folder.parent / "Dataset0521_Other").mkdir()
    folds = [{"train": ["case_0"], "val": ["case_1"]}] * 53
    (folder / "splits_final.json").write_text(json.dumps(folds))
    assert train("52 3d_fullres 52").exit_code == 0
    assert calls == [["masksam train", NAME, "3d_fullres", "52", "-device", "cpu", "-tr", "MaskSAMTrainer"]]
