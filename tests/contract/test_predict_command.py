"""``masksam predict`` as it is called, on tiny networks: against nnU-Net's own commands, and with what goes wrong."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import typer
from made_up_models import MASKSAM, STOCK, write_image, write_pair, write_unet
from nnunetv2.ensembling.ensemble import ensemble_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing_to_folder,
    remove_all_but_largest_component_from_segmentation,
)
from plain_plans import DATASET
from typer.testing import CliRunner, Result

from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.files import read_json, write_json
from masksam_nnunet.inference.predictor import MaskSAMPredictor

QUICK = ["-d", "42", "-device", "cpu", "--disable_tta", "--disable_progress_bar", "-step_size", "1"]
ALONE = ["-npp", "0", "-nps", "0"]
PAIR = ["--ensemble", "nnUNetTrainer", "MaskSAMTrainer@nnUNetPlans:3d_fullres", "-c", "3d_fullres", "-f", "0"]
ONE = ["-tr", "nnUNetTrainer", "-c", "3d_fullres", "-f", "0"]
SIZE = (34, 30, 4)  # several windows
KEEP_LARGEST = (
    [remove_all_but_largest_component_from_segmentation] * 2,
    [{"labels_or_regions": 1}, {"labels_or_regions": 2}],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_pair(tmp_path_factory.mktemp("models") / "nnUNet_results", folds=2, channels=2).parent


@pytest.fixture(autouse=True)
def _nnunet(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(models.with_name(name)))
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    monkeypatch.setenv("nnUNet_results", str(models))
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 1)  # as many threads nnU-Net's command takes
    monkeypatch.setattr("sys.argv", ["masksam"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two cases of two channels."""
    for number, name in enumerate("ab"):
        for channel in range(2):
            write_image(tmp_path / "images" / f"{name}_{channel:04d}.nii.gz", 10 * number + channel, SIZE)
    return tmp_path / "images"


def predict(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["predict", *map(str, words), *QUICK, *([] if "-npp" in words else ALONE)])


def labels(folder: Path) -> dict[str, Any]:
    return {
        file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted(folder.glob("[!.]*.nii.gz"))
    }


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.nii.gz")}


def by_nnunet(model: Path, images: Path, out: Path, folds: tuple[int, ...]) -> Path:
    """What nnU-Net's own predictor writes, with probabilities."""
    predictor = nnUNetPredictor(1.0, True, False, False, torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    out.mkdir()
    predictor.predict_from_files_sequential(str(images), str(out), save_probabilities=True)
    return out


def test_an_ensemble_is_what_nnunets_commands_make(
    models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both methods, both folds, in processes of their own; then probabilities and post-processing."""
    members = [by_nnunet(models / DATASET / name, images, tmp_path / name, (0, 1)) for name in (STOCK, MASKSAM)]
    theirs, theirs_pp = tmp_path / "theirs", tmp_path / "theirs_pp"
    with monkeypatch.context() as patch:  # in this process
        patch.setattr("multiprocessing.get_context", lambda _: SimpleNamespace(Pool=ThreadPool))
        ensemble_folders([str(m) for m in members], str(theirs), save_merged_probabilities=True, num_processes=1)
        apply_postprocessing_to_folder(
            str(theirs), str(theirs_pp), *KEEP_LARGEST, str(members[0] / "plans.json"), num_processes=1
        )
    pair = models / DATASET / "ensembles" / f"ensemble___{MASKSAM}___{STOCK}___0_1"
    pair.mkdir(parents=True, exist_ok=True)
    (pair / "postprocessing.pkl").write_bytes(pickle.dumps(KEEP_LARGEST))
    out = tmp_path / "out"
    words = ["-i", images, "-o", out, *PAIR, 1, "--postprocessing", "auto", "--keep-probabilities"]
    result = predict(*words, "-npp", 0, "-nps", 1, "--batch-size", 1)
    assert result.exit_code == 0, result.output
    expected, found = labels(theirs_pp), labels(out)
    assert found.keys() == expected.keys() and len(found) == 2
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        file = name.replace(".nii.gz", ".npz")
        one, other = (np.load(folder / file)["probabilities"].astype(float) for folder in (out, theirs))
        np.testing.assert_array_equal(one, other)
        assert other.std() > 0.05
    assert any((labels(theirs)[name] != array).any() for name, array in expected.items()), "nothing to post-process"
    for name in ("dataset.json", "plans.json"):
        assert json.loads((out / name).read_text()) == json.loads((models / DATASET / STOCK / name).read_text())
    arguments = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert arguments["save_probabilities"] is True
    assert [model["model"] for model in arguments["masksam"]["models"]] == [STOCK, MASKSAM]
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


def test_a_bad_case_costs_itself_only_and_what_is_whole_is_not_done_again(images: Path, tmp_path: Path) -> None:
    bad, out = images / "b_0001.nii.gz", tmp_path / "out"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    result = predict("-i", images, "-o", out, *ONE)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "  b: " in result.stderr and "b_0001.nii.gz" in result.stderr
    assert list(labels(out)) == ["a.nii.gz"]
    before = times(out)
    bad.write_bytes(whole)
    assert predict("-i", images, "-o", out, *ONE, "--continue_prediction").exit_code == 0
    expected = labels(out)
    assert list(expected) == ["a.nii.gz", "b.nii.gz"] and times(out)["a.nii.gz"] == before["a.nii.gz"]
    # As nnU-Net's own command leaves a prediction when it is killed while it writes.
    cut_off = out / "b.nii.gz"
    cut_off.write_bytes(cut_off.read_bytes()[:-40])
    assert predict("-i", images, "-o", out, *ONE, "--continue_prediction").exit_code == 0
    np.testing.assert_array_equal(labels(out)["b.nii.gz"], expected["b.nii.gz"])
    assert times(out)["a.nii.gz"] == before["a.nii.gz"]


def test_a_case_that_a_network_cannot_predict(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model's predictions are kept, and taken the second time."""
    predicted: list[str] = []
    broken = True
    real = MaskSAMPredictor.predict_logits_from_preprocessed_data

    def logits(self: MaskSAMPredictor, data: torch.Tensor) -> torch.Tensor:
        predicted.append(self.trainer_name)
        if broken and predicted.count("MaskSAMTrainer") == 2 and self.trainer_name == "MaskSAMTrainer":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, data)

    monkeypatch.setattr(MaskSAMPredictor, "predict_logits_from_preprocessed_data", logits)
    out = tmp_path / "out"
    result = predict("-i", images, "-o", out, *PAIR)
    assert result.exit_code == 1
    assert "  b: " in result.stderr and "MaskSAMTrainer" in result.stderr and "CUDA out of memory" in result.stderr
    assert list(labels(out)) == ["a.nii.gz"]
    broken = False
    predicted.clear()
    assert predict("-i", images, "-o", out, *PAIR, "--continue_prediction").exit_code == 0
    assert predicted == ["MaskSAMTrainer"], "of all that is missing, one prediction of one model"
    assert list(labels(out)) == ["a.nii.gz", "b.nii.gz"] and not (out / ".ensemble").exists()


def test_parts_are_mixed_but_predictions_of_other_models_are_not(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model cannot continue, but start anew; then nothing of the first is left, even if it breaks off."""
    out, other = tmp_path / "out", [*ONE, "-tr", "MaskSAMTrainer"]
    for part, done in ((1, ["b"]), (0, ["a", "b"])):  # two commands that share the cases
        result = predict("-i", images, "-o", out, *ONE, "-num_parts", 2, "-part_id", part)
        assert result.exit_code == 0, result.output
        assert list(labels(out)) == [f"{name}.nii.gz" for name in done]
    before = times(out)
    for words in ([*ONE, "1"], PAIR, other):
        result = predict("-i", images, "-o", out, *words, "--continue_prediction")
        assert result.exit_code == 1 and "--continue_prediction: " in result.stderr
    (checkpoint,) = Path(os.environ["nnUNet_results"]).glob("*/nnUNetTrainer__*__3d_fullres/fold_0/*final.pth")
    saved = checkpoint.stat()
    os.utime(checkpoint, (saved.st_atime, saved.st_mtime + 60))  # its training has gone on
    result = predict("-i", images, "-o", out, *ONE, "--continue_prediction")
    os.utime(checkpoint, (saved.st_atime, saved.st_mtime))
    assert result.exit_code == 1 and "--continue_prediction: " in result.stderr
    assert times(out) == before

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MaskSAMPredictor, "predict_logits_from_preprocessed_data", interrupted)
        assert predict("-i", images, "-o", out, *other).exit_code == 130
    assert not times(out)
    assert predict("-i", images, "-o", out, *other, "--continue_prediction").exit_code == 0
    assert times(out).keys() == before.keys()


def test_an_ensemble_that_starts_anew_takes_nothing_of_an_earlier_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_logits = MaskSAMPredictor.predict_logits_from_preprocessed_data
    for calls in (4, 1):  # broken off at the second model's second case, then at the first model's first
        left = iter(range(calls, 0, -1))

        def interrupted(*given: Any, left: Iterator[int] = left) -> Any:
            if next(left) == 1:
                raise KeyboardInterrupt
            return predict_logits(*given)

        monkeypatch.setattr(MaskSAMPredictor, "predict_logits_from_preprocessed_data", interrupted)
        assert predict("-i", images, "-o", tmp_path / "out", *PAIR).exit_code == 130
        assert len(list((tmp_path / "out").rglob("*.npz"))) == calls - 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-i", "{none}", *ONE], ["-i", "none"]),
        (["-i", "{empty}", *PAIR], ["-i", "empty"]),
        (["-o", "{file}", *ONE], ["-o", "file"]),
        (["-o", "{images}", *ONE], ["-o", "images"]),
        ([*ONE, "3"], ["-f 0 3", "only of: 0 1"]),
        ([*ONE, "x"], ["-f x"]),
        ([*ONE, "-c", "2d"], ["nnUNetTrainer__nnUNetPlans__2d", MASKSAM]),
        ([*ONE, "-d", "7"], ["-d 7"]),
        ([*ONE[:2], "-f", "0"], ["-c"]),
        ([*PAIR, "-tr", "nnUNetTrainer"], ["-tr nnUNetTrainer", "--ensemble"]),
        ([*ONE, "-prev_stage_predictions", "{none}"], ["-prev_stage_predictions", "none"]),
        (["-o", "{empty}", *ONE, "-prev_stage_predictions", "{empty}"], ["-o", "-prev_stage_predictions"]),
        ([*ONE, "-step_size", "2"], ["-step_size 2"]),
        ([*ONE, "--postprocessing", "auto"], ["--postprocessing auto"]),
        ([*ONE, "-num_parts", "2", "-part_id", "2"], ["-part_id 2"]),
        ([*ONE, "--model", "{empty}"], ["--model", "empty"]),
        ([*ONE, "-device", "cuda"], ["-device cuda"]),
    ],
)
def test_early_errors(images: Path, tmp_path: Path, words: list[str], named: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: str(tmp_path / name) for name in ("none", "empty", "file", "images")}
    words = [word.format(**places) for word in words]
    base = [] if "-i" in words else ["-i", images]
    base += [] if "-o" in words else ["-o", tmp_path / "out"]
    # Those under test come last: the last value counts.
    result = CliRunner().invoke(cli.app, ["predict", *QUICK, *ALONE, *map(str, base), *words])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stderr.startswith("error: ") and all(name in result.stderr for name in named), result.stderr
    assert not (tmp_path / "out").exists() and len(os.listdir(images)) == 4


def test_options_are_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of nnUNetv2_predict is here, with its default; -tr, -d and -c are known to differ."""
    parsers: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        predict_entry_point()
    ours = {name: option for option in typer.main.get_command(cli.app).commands["predict"].params
            for name in option.opts}  # fmt: skip
    defaults = {"-tr": None, "-d": None, "-c": None, "-f": None}
    for action in parsers[0]._actions:
        for name in set(action.option_strings) - {"-h", "--help"}:
            assert name in ours, name
            if name in ("-i", "-o"):
                assert ours[name].required
            else:
                assert ours[name].default == defaults.get(name, action.default), name
            assert ours[name].multiple == (action.nargs == "+"), name


@pytest.fixture
def own_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the dataset's folder."""
    shutil.copytree(models, tmp_path / "results")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results" / DATASET


def edit(**changes: object) -> Callable[[Path], None]:
    return lambda file: write_json(file, read_json(file) | changes)


@pytest.mark.parametrize(
    ("file", "spoil", "named"),
    [
        ("dataset.json", edit(labels={"background": 0, "organ 1": 1}), ["--ensemble", STOCK, MASKSAM, "labels"]),
        ("dataset.json", edit(channel_names={"0": "CT"}), ["--ensemble", STOCK, MASKSAM, "channels"]),
        ("plans.json", edit(dataset_name="Dataset007_Other"), ["--ensemble", STOCK, MASKSAM, "dataset"]),
        ("plans.json", edit(image_reader_writer="NibabelIO"), ["--ensemble", STOCK, MASKSAM, "reader"]),
        ("plans.json", lambda file: os.truncate(file, 20), [f"{MASKSAM}/plans.json"]),
        ("fold_0/checkpoint_final.pth", lambda file: os.truncate(file, 0), [f"{MASKSAM}/fold_0/checkpoint_final.pth"]),
        ("fold_0/checkpoint_final.pth", lambda file: os.truncate(file, 5000), [f"{MASKSAM}/fold_0/checkpoint"]),
    ],
)
def test_models_that_do_not_fit_or_are_cut_off(
    own_models: Path, images: Path, tmp_path: Path, file: str, spoil: Callable[[Path], object], named: list[str]
) -> None:
    spoil(own_models / MASKSAM / file)
    result = predict("-i", images, "-o", tmp_path / "out", *PAIR)
    assert result.exit_code == 1 and all(name in result.stderr for name in named), result.output
    assert not (tmp_path / "out").exists()


def test_a_cascade_needs_its_previous_stage(own_models: Path, images: Path, tmp_path: Path) -> None:
    """Two stages of stock nnU-Net beside a MaskSAM: refused without the first; then each gets what it needs."""
    low, cascade = (own_models / f"nnUNetTrainer__nnUNetPlans__3d_{name}" for name in ("lowres", "cascade_fullres"))
    write_unet(low, 1, 2, configuration="3d_lowres")
    write_unet(cascade, 1, 2, more_inputs=2, configuration="3d_cascade_fullres")
    out = tmp_path / "out"
    members = ["nnUNetTrainer:3d_cascade_fullres", "MaskSAMTrainer:3d_fullres"]
    words = ["-i", images, "-o", out, "-f", "0", "--ensemble", *members]
    result = predict(*words)
    assert result.exit_code == 1 and not out.exists()
    assert low.name in result.stderr and "-prev_stage_predictions" in result.stderr

    alone = ["-i", images, "-tr", "nnUNetTrainer", "-f", "0"]
    result = predict(*alone, "-o", out, "-c", "3d_cascade_fullres")
    assert result.exit_code == 1 and "-prev_stage_predictions" in result.stderr
    assert predict(*alone, "-o", tmp_path / "low", "-c", "3d_lowres").exit_code == 0
    (tmp_path / "low" / "b.nii.gz").unlink()
    result = predict(*words, "-prev_stage_predictions", tmp_path / "low")
    assert result.exit_code == 1 and "  b: " in result.stderr and "low/b.nii.gz" in result.stderr
    assert list(labels(out)) == ["a.nii.gz"]

    # The first stage as a member is predicted first, wherever it is named.
    result = predict(*words, "nnUNetTrainer:3d_lowres", "-o", tmp_path / "three")
    assert result.exit_code == 0, result.output
    assert list(labels(tmp_path / "three")) == ["a.nii.gz", "b.nii.gz"]
    assert result.stdout.index("3d_lowres: 2 cases") < result.stdout.index("3d_cascade_fullres: 2 cases")
