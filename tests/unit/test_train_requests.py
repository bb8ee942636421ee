"""What masksam train refuses before nnU-Net makes a folder: in words, with what mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from nnunetv2.run import run_training as nnunet
from plain_plans import plain_plans
from typer.testing import CliRunner

from masksam_nnunet.cli.app import app
from masksam_nnunet.environment import EXT_TRAINER

NAME = "Dataset052_Asked"
RIGHT = ("52", "3d_fullres", "0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned and preprocessed dataset of five empty cases, as far as it is looked at."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv(EXT_TRAINER, "")
    monkeypatch.setattr("sys.argv", [])
    found = tmp_path / "nnUNet_preprocessed" / NAME
    (found / "hand_data").mkdir(parents=True)
    (found / "nnUNetPlans.json").write_text(json.dumps(plain_plans() | {"dataset_name": NAME}))
    (found / "dataset.json").write_text("{}")
    for number in range(5):
        (found / "hand_data" / f"case_{number}.b2nd").touch()
        (found / "hand_data" / f"case_{number}.pkl").touch()
    return found


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["train", *words, "-device", "cpu"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result, result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_what_is_right_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def train(*words: object, **_: object) -> None:
        calls.append(words)

    monkeypatch.setattr(nnunet, "run_training", train)
    assert CliRunner().invoke(app, ["train", *RIGHT, "-device", "cpu", "--npz"]).exit_code == 0
    assert [call[:5] for call in calls] == [(*RIGHT, "MaskSAMTrainer", "nnUNetPlans")]
    assert nnunet.run_training is train


REQUESTS: dict[str, tuple[str, str]] = {
    "dataset": ("77 3d_fullres 0", "77: no such dataset in nnUNet_preprocessed = "),
    "dataset by name": ("Dataset052_Ask 3d_fullres 0", f", which holds {NAME}; plan and preprocess it first: "),
    "no dataset": ("Asked 3d_fullres 0", "Asked: no such dataset in nnUNet_preprocessed = "),
    "configuration": ("52 3d_lowres 0", "nnUNetPlans.json has no such configuration, but 3d_fullres"),
    "plans": ("52 3d_fullres 0 -p MaskSAMPlans", "MaskSAMPlans.json; make it with: masksam plan -d 52 --plans-name"),
    "trainer": ("52 3d_fullres 0 -tr MaskSAMTrainr", "-tr MaskSAMTrainr: nnU-Net finds no such trainer "),
    "fold": ("52 3d_fullres first", "fold first: give a number from 0 on, or all"),
    "weights": ("52 3d_fullres 0 -pretrained_weights none.pth", "-pretrained_weights none.pth: there is no such file"),
    "go on and validate": ("52 3d_fullres 0 --c --val", "--c and --val do not go together: leave one out"),
    "validate": ("52 3d_fullres 0 --val", "checkpoint_final.pth: the training is not finished; go on with it (--c)"),
}


@pytest.mark.parametrize("wrong", REQUESTS)
def test_requests_that_cannot_be(folder: Path, wrong: str) -> None:
    words, said = REQUESTS[wrong]
    assert said in refused(*words.split())
    assert list((folder.parents[1] / "nnUNet_results").iterdir()) == []


STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not preprocessed": (
        lambda folder: shutil.rmtree(folder / "hand_data"),
        "hand_data holds no case; preprocess them with: nnUNetv2_preprocess -d 52 -plans_name nnUNetPlans -c 3d",
    ),
    "plans cut off": (
        lambda folder: (folder / "nnUNetPlans.json").write_text('{"configurations": {'),
        "make it again with: nnUNetv2_plan_and_preprocess -d 52",
    ),
    "no dataset.json": (
        lambda folder: (folder / "dataset.json").unlink(),
        "which planning writes; plan again with: nnUNetv2_plan_and_preprocess -d 52",
    ),
    "four cases": (
        lambda folder: (folder / "hand_data" / "case_4.b2nd").unlink(),
        "fold 0: 4 cases, and nnU-Net's default split has 5 folds; train on all of them (fold all), or write ",
    ),
    "two datasets": (
        lambda folder: (folder.parent / "Dataset052_Other").mkdir(),
        "Or give its name in place of 52",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_states_that_cannot_be_trained_from(folder: Path, state: str) -> None:
    spoil, said = STATES[state]
    spoil(folder)
    assert said in refused(*RIGHT)
    assert list((folder.parents[1] / "nnUNet_results").iterdir()) == []
