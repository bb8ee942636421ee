"""The container's entry point: as the platform runs it, and its parts in this process, against nnU-Net's predictor."""

from __future__ import annotations

import multiprocessing.process
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from contained import run_contained
from made_up_models import same_geometry, write_image, write_inputs_json, write_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from typer.testing import CliRunner

from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.inference.docker import algorithm
from masksam_nnunet.inference.docker.__main__ import app
from masksam_nnunet.inference.docker.interface import OutputError
from masksam_nnunet.inference.export.write import write_portable


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start a worker: shared memory is small on the platform."""

    def refuse(self: object, *_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds, below a folder of another name, as an unpacked archive has it."""
    return write_model(tmp_path_factory.mktemp("models") / "Dataset042_Hand" / "model", folds=2)


def run(root: Path, model: Path, device: str = "cpu", **options: Any) -> int:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    return algorithm.run(root / "input", root / "output", [model], scratch, device=device, options=options)


def nnunet_labels(model: Path, files: list[Path], root: Path, folds: tuple[int, ...], **options: Any) -> np.ndarray:
    """What nnU-Net's own predictor makes of the files."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    inputs = []
    for channel, file in enumerate(files):
        inputs.append(str(root / f"expected_{channel:04d}.nii.gz"))
        sitk.WriteImage(sitk.ReadImage(str(file)), inputs[-1])
    predictor.predict_from_files_sequential([inputs], [str(root / "expected")])
    return sitk.GetArrayFromImage(sitk.ReadImage(str(root / "expected.nii.gz")))


def labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_as_the_platform_runs_it(model: Path, tmp_path: Path) -> None:
    """Read-only root, no network, no name, no home: one importable image, as nnU-Net predicts it, and nothing else."""
    file = write_image(tmp_path / "input/images/mri/0f3c.mha")
    write_inputs_json(tmp_path / "input", heart_mri="images/mri")
    options = ["--output-slug", "heart-labels", "--no-mirroring"]
    done, left = run_contained(tmp_path / "input", tmp_path / "output", model.parent, *options)
    assert done.returncode == 0, done.stderr
    written = [path.relative_to(tmp_path / "output") for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert written == [Path("images/heart-labels/0f3c.mha")]
    assert left == ""
    result = sitk.ReadImage(str(tmp_path / "output" / written[0]))
    assert result.GetPixelID() == sitk.sitkUInt8 and same_geometry(result, sitk.ReadImage(str(file)))
    expected = nnunet_labels(model, [file], tmp_path, (0, 1), use_mirroring=False)
    assert len(np.unique(expected)) > 1, "a prediction of one label would agree with anything"
    assert (sitk.GetArrayFromImage(result) == expected).mean() > 0.999  # sums in float16
    for line in ("model loaded: folds 0 1", "1 of 1 cases done"):
        assert line in done.stdout


def test_one_bad_case_costs_itself_only(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "input" / "images" / "mri"
    good = [write_image(folder / f"{name}.mha", seed) for seed, name in enumerate("ac")]
    bad = write_image(folder / "b.mha")
    bad.write_bytes(bad.read_bytes()[:-200])
    nan = sitk.ReadImage(str(good[0]))
    nan[3, 3, 3] = float("nan")
    sitk.WriteImage(nan, str(folder / "d.mha"))
    assert run(tmp_path, model, folds=["0"], mirroring=False) == 1
    assert {file.name for file in (tmp_path / "output/images/segmentation").iterdir()} == {"a.mha", "c.mha"}
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [str(bad), str(folder / "d.mha")]
    assert str(tmp_path / "scratch") not in printed.err, "the user knows the files that were given only"
    assert "2 of 4 cases done" in printed.out
    assert not list((tmp_path / "scratch").iterdir())


def test_channels_and_another_reader(tmp_path: Path) -> None:
    """Two channels in the model's order, MHA for a model whose reader takes NIfTI and turns it."""
    model = write_model(tmp_path / "model", channels=2, reader="NibabelIOWithReorient")
    (model / "container.json").write_text('{"channels": ["t2", "adc"], "output": "lesions"}')
    t2 = write_image(tmp_path / "input/images/t2/x.mha", 1)
    adc = write_image(tmp_path / "input/images/adc/y.mha", 2)
    assert run(tmp_path, model, mirroring=False) == 0
    result = tmp_path / "output/images/lesions/x.mha"
    assert same_geometry(sitk.ReadImage(str(result)), sitk.ReadImage(str(t2)))
    expected = nnunet_labels(model, [t2, adc], tmp_path, (0,), use_mirroring=False)
    other = nnunet_labels(model, [adc, t2], tmp_path, (0,), use_mirroring=False)
    telling = expected != other
    assert telling.any() and (labels(result) == expected)[telling].all()
    assert (labels(result) == expected).mean() > 0.999


def test_models_that_lack_something(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("fold_1")))
    write_image(tmp_path / "input/a.nii.gz")
    file = copy / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=file.name):
        run(tmp_path, copy)
    for missing in (file, copy / "dataset.json"):
        missing.unlink()
        with pytest.raises(ModelError, match=missing.name):
            run(tmp_path, copy)


def test_where_the_model_is_looked_for(model: Path, tmp_path: Path) -> None:
    find = algorithm.find_model
    (tmp_path / "mounted").mkdir()
    assert find([tmp_path / "absent", tmp_path / "mounted", model.parents[1]]) == model
    benchmarked = tmp_path / "benchmarked" / "crossval_results_folds_0"
    benchmarked.mkdir(parents=True)
    for folder in (benchmarked, benchmarked.parent):
        (folder / "plans.json").touch()
    assert find([benchmarked.parent]) == benchmarked.parent
    with pytest.raises(ModelError, match="mounted"):  # an empty folder is not a model's
        find([tmp_path / "mounted"])
    for name in "ab":
        (tmp_path / "mounted" / name).mkdir()
        (tmp_path / "mounted" / name / "plans.json").touch()
    with pytest.raises(ModelError, match="a, b"):
        find([tmp_path / "mounted"])


def test_folds_and_devices_that_are_not_there(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "input/a.nii.gz")
    with pytest.raises(ModelError, match="fold_7"):
        run(tmp_path, model, folds=["0", "7"])
    with pytest.raises(UsageError, match="--device nonsense"):
        run(tmp_path, model, device="nonsense")
    (tmp_path / "output").rmdir()
    (tmp_path / "output").touch()
    with pytest.raises(OutputError, match="--output"):
        run(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"input": "nowhere"}, 3, "--input nowhere"),
        ({"model": "nowhere"}, 4, "nowhere"),
        ({"scratch": "nowhere"}, 5, "--scratch nowhere"),
        ({"step-size": "-3"}, 2, "step_size"),
    ],
)
def test_exit_codes(
    change: dict[str, str], code: int, named: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    write_image(tmp_path / "input/a.nii.gz")
    (tmp_path / "scratch").mkdir()
    options = {"input": "input", "output": "output", "scratch": "scratch", "model": str(model)} | change
    monkeypatch.chdir(tmp_path)
    try:
        done = CliRunner().invoke(app, [word for name, value in options.items() for word in (f"--{name}", value)])
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert done.exit_code == code
    (error,) = done.stderr.splitlines()  # the platform shows the last line only
    assert named in error


def test_portable_models(model: Path, tmp_path: Path) -> None:
    """Without pickle, the same labels."""
    named = Path(shutil.copytree(model, tmp_path / "MaskSAMTrainer__nnUNetPlans__3d_fullres"))
    portable = write_portable(named, tmp_path / "portable", ("0", "1")).output
    write_image(tmp_path / "input/a.nii.gz")
    found = []
    for folder in (model, portable):
        assert run(tmp_path, folder, mirroring=False) == 0
        found.append(labels(tmp_path / "output/a.nii.gz"))
    assert np.array_equal(*found) and len(np.unique(found[0])) > 1
