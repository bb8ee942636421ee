"""The container's entry point: as the platform runs it, and its parts in this process, against nnU-Net's predictor."""

from __future__ import annotations

import gc
import json
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from configs import tiny_config
from contained import run_contained
from container_models import add_fold, build_network, same_geometry, write_image, write_inputs_json, write_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from plain_plans import plain_plans
from small_sam import SMALL_SAM, install_small_sam
from typer.testing import CliRunner

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.inference.docker import timed
from masksam_nnunet.inference.docker.algorithm import run
from masksam_nnunet.inference.docker.errors import ModelFolderError, OptionError, OutputError
from masksam_nnunet.inference.docker.models import find_model
from masksam_nnunet.inference.docker.options import Settings, app
from masksam_nnunet.inference.export.write import export_portable
from masksam_nnunet.plans.architecture import write_config
from masksam_nnunet.sam_weights import released

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may start a worker: shared memory is small on the platform."""

    def refuse(self: object, *_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds, below a folder of another name, as an unpacked archive has it."""
    return write_model(tmp_path_factory.mktemp("models") / "Dataset042_Hand" / "model", folds=3)


def settings(root: Path, model: Path, **changes: Any) -> Settings:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    return Settings(root / "input", root / "output", (model,), scratch, device="cpu", **changes)


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


def test_as_the_platform_runs_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read-only root, no network, no name, no home: one importable image, as nnU-Net predicts it, and nothing else."""
    file = write_image(tmp_path / "input/images/mri/0f3c.mha")
    write_inputs_json(tmp_path / "input", heart_mri="images/mri")
    done = run_contained(tmp_path / "input", tmp_path / "output", model.parent, "--output-slug", "heart-labels")
    with capsys.disabled():
        print(f" [{done.how}]", end="")
    assert done.code == 0, done.stderr
    written = [path.relative_to(tmp_path / "output") for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert written == [Path("images/heart-labels/0f3c.mha")]
    assert done.left == ""
    result = sitk.ReadImage(str(tmp_path / "output" / written[0]))
    assert result.GetPixelID() == sitk.sitkUInt8 and same_geometry(result, sitk.ReadImage(str(file)))
    expected = nnunet_labels(model, [file], tmp_path, (0, 1, 2))
    assert len(np.unique(expected)) > 1, "a prediction of one label would agree with anything"
    assert (sitk.GetArrayFromImage(result) == expected).mean() > 0.999  # sums in float16
    for line in ("model loaded: folds 0 1 2", "1 of 1 cases done"):
        assert line in done.stdout


def test_the_surroundings_are_what_they_claim(model: Path, tmp_path: Path) -> None:
    """The test above would show little in surroundings that allow all."""
    (tmp_path / "input").mkdir()
    code = (
        "import os, socket\n"
        "assert os.getuid() != 0 or not open('/proc/self/status').read().split('CapEff:')[1].split()[0].strip('0')\n"
        "try:\n    socket.create_connection(('192.0.2.1', 80), timeout=5)\n"
        "except (OSError, RuntimeError) as error:\n    print('refused:', error)\n"
        "for place in ('/', '/opt', '/usr', os.path.dirname(os.__file__)):\n"
        "    assert not os.access(place, os.W_OK), place\n"
        "print('home:', os.environ.get('HOME'))\n"
    )
    done = run_contained(tmp_path / "input", tmp_path / "output", model, code=code)
    assert done.code == 0, done.stderr
    assert "refused:" in done.stdout and "timed out" not in done.stdout and "home: None" in done.stdout


def test_one_bad_case_costs_itself_only(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "input" / "images" / "mri"
    good = [write_image(folder / f"{name}.mha", seed) for seed, name in enumerate("ac")]
    bad = write_image(folder / "b.mha")
    bad.write_bytes(bad.read_bytes()[:-200])
    nan = sitk.ReadImage(str(good[0]))
    nan[3, 3, 3] = float("nan")
    sitk.WriteImage(nan, str(folder / "d.mha"))
    assert run(settings(tmp_path, model, folds=("0",), mirroring=False)) == 1
    assert {file.name for file in (tmp_path / "output/images/segmentation").iterdir()} == {"a.mha", "c.mha"}
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [str(bad), str(folder / "d.mha")]
    assert "cut off" in errors[0] and "1 voxels that are NaN or infinite" in errors[1]
    assert str(tmp_path / "scratch") not in printed.err, "the user knows the files that were given only"
    assert "2 of 4 cases done" in printed.out
    assert not list((tmp_path / "scratch").iterdir())


def test_channels_and_another_reader(tmp_path: Path) -> None:
    """Two channels in the model's order, MHA for a model whose reader takes NIfTI and turns it."""
    model = write_model(tmp_path / "model", channels=2, reader="NibabelIOWithReorient")
    (model / "container.json").write_text('{"channels": ["t2", "adc"], "output": "lesions"}')
    t2 = write_image(tmp_path / "input/images/t2/x.mha", 1)
    adc = write_image(tmp_path / "input/images/adc/y.mha", 2)
    assert run(settings(tmp_path, model)) == 0
    result = tmp_path / "output/images/lesions/x.mha"
    assert same_geometry(sitk.ReadImage(str(result)), sitk.ReadImage(str(t2)))
    expected = nnunet_labels(model, [t2, adc], tmp_path, (0,))
    other = nnunet_labels(model, [adc, t2], tmp_path, (0,))
    telling = expected != other
    assert telling.any() and (labels(result) == expected)[telling].all()
    assert (labels(result) == expected).mean() > 0.999


def test_flat_folders_as_amos_wants_them(model: Path, tmp_path: Path) -> None:
    file = write_image(tmp_path / "input/amos_0001.nii.gz")
    assert run(settings(tmp_path, model, folds=("1",))) == 0
    (written,) = (tmp_path / "output").iterdir()
    assert written.name == "amos_0001.nii.gz"
    result = sitk.ReadImage(str(written))
    assert result.GetPixelID() == sitk.sitkUInt8 and same_geometry(result, sitk.ReadImage(str(file)), 1e-6)
    assert (labels(written) == nnunet_labels(model, [file], tmp_path, (1,))).mean() > 0.999


@pytest.mark.parametrize(
    ("seconds", "way", "used"),
    [
        (0.01, "3 folds, 4 mirrors", (0, 1, 2)),
        (15.0, "3 folds, no mirroring", (0, 1, 2)),
        (60.0, "2 folds, no mirroring", (0, 1)),
        (1e6, "1 fold, no mirroring", (0,)),
    ],
)
def test_what_fits_into_the_time(
    seconds: float, way: str, used: tuple[int, ...], model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A window is said to take so long; there are two, and 270 seconds."""
    monkeypatch.setattr(timed, "seconds_per_window", lambda *_: seconds)
    monkeypatch.setattr("masksam_nnunet.inference.docker.time_limit.Deadline.passed", lambda _: 0.0)
    file = write_image(tmp_path / "input/a.nii.gz")
    assert run(settings(tmp_path, model, time_limit=5)) == 0
    printed = capfd.readouterr().out
    assert ("time limit: predicting with" in printed) == (way != "3 folds, 4 mirrors")
    assert way in printed and ("even this is too long" in printed) == (seconds == 1e6)
    mirroring = way == "3 folds, 4 mirrors"
    expected = nnunet_labels(model, [file], tmp_path, used, use_mirroring=mirroring)
    others = nnunet_labels(model, [file], tmp_path, (0, 1, 2), use_mirroring=not mirroring)
    assert (labels(tmp_path / "output/a.nii.gz") == expected).mean() > 0.999
    assert (expected != others).any(), "the ways must differ, or nothing is shown"


def test_windows_are_measured_and_folds_that_take_too_long_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The estimate was too low: after the first fold time is up. It is a real clock that is measured with."""
    clock = {"passed": 0.0}
    monkeypatch.setattr("masksam_nnunet.inference.docker.time_limit.Deadline.passed", lambda _: clock["passed"])
    original = timed.MaskSAMPredictor.hold_fold

    def hold(self: Any, index: int) -> Any:
        clock["passed"] = 0.0 if index == 0 else 269.9999
        return original(self, index)

    monkeypatch.setattr(timed.MaskSAMPredictor, "hold_fold", hold)
    file = write_image(tmp_path / "input/a.nii.gz")
    assert run(settings(tmp_path, model, time_limit=5)) == 0
    printed = capfd.readouterr().out
    assert "2 windows of 0.0" in printed and "stopped after 2 of 3 folds" in printed
    assert (labels(tmp_path / "output/a.nii.gz") == nnunet_labels(model, [file], tmp_path, (0, 1))).mean() > 0.999


def test_memory_does_not_grow_with_cases(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of one case and of four alike, above what is held before; without the network, which would take minutes."""

    def logits(_: Any, data: torch.Tensor) -> Iterator[torch.Tensor]:
        yield torch.randn(3, *data.shape[1:]).half()

    monkeypatch.setattr(timed.MaskSAMPredictor, "logits_of_folds", logits)
    size = (128, 120, 64)
    peaks = {}
    for cases in (1, 4):
        root = tmp_path / str(cases)
        for number in range(cases):
            write_image(root / f"input/{number}.nii.gz", number, size)
        gc.collect()
        held = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        assert run(settings(root, model, folds=("0",), mirroring=False)) == 0
        status = Path("/proc/self/status").read_text()
        peaks[cases] = int(status.split("VmHWM:")[1].split()[0]) * 1024 - held
    volume = np.prod(size) * 4
    assert peaks[4] < peaks[1] + 2 * volume, {cases: peak / volume for cases, peak in peaks.items()}


def test_lean_checkpoints_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)
    file = install_small_sam(tmp_path / "cache", monkeypatch)
    model = write_model(tmp_path / "model", folds=0)
    plans = plain_plans((3, 32, 32))
    write_config(plans, "3d_fullres", tiny_config(patch_size=(3, 32, 32), backbone="vit_b"))
    (model / "plans.json").write_text(json.dumps(plans))
    network = build_network(plans, 1)
    network.set_sam_sha256(released("vit_b").sha256)
    with network.lean_state_dicts():
        add_fold(model, 0, network)
    file.unlink()
    write_image(tmp_path / "input/a.nii.gz")
    with pytest.raises(ModelFolderError, match=r"are lean, .*masksam export"):
        run(settings(tmp_path, model))


def broken_checkpoint(model: Path) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:5000])


def no_final_checkpoint(model: Path) -> None:
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_best.pth")


def no_dataset(model: Path) -> None:
    (model / "dataset.json").unlink()


def another_folder(model: Path) -> None:
    (model / "plans.json").rename(model / "plans.txt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_checkpoint, r"cannot be loaded"),
        (no_final_checkpoint, r"no fold_N/checkpoint_final\.pth, but fold_0/checkpoint_best\.pth"),
        (no_dataset, r"dataset\.json does not name the model's channels"),
        (another_folder, r"holds no model, but dataset\.json, fold_0, plans\.txt"),
    ],
)
def test_models_that_lack_something(damage: Any, message: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    damage(model)
    write_image(tmp_path / "input/a.nii.gz")
    with pytest.raises(ModelFolderError, match=message):
        run(settings(tmp_path, model))


def test_where_the_model_is_looked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    assert find_model((tmp_path / "absent", tmp_path / "mounted", model)) == model  # an empty folder is not a model's
    assert find_model((model.parents[1],)) == model
    with pytest.raises(ModelFolderError, match=r"no model in .*mounted"):
        find_model((tmp_path / "mounted",))
    for name in "ab":
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "plans.json").touch()
    with pytest.raises(ModelFolderError, match=r"several models \(a, b\): name one with --model"):
        find_model((tmp_path / "two",))


def test_folds_and_devices_that_are_not_there(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "input/a.nii.gz")
    with pytest.raises(ModelFolderError, match=r"no checkpoint_final\.pth of fold 7; it has 0, 1, 2"):
        run(settings(tmp_path, model, folds=("0", "7")))
    with pytest.raises(OptionError, match="--device nonsense: there is no such device"):
        run(Settings(tmp_path / "input", tmp_path / "output", (model,), tmp_path, device="nonsense"))
    (tmp_path / "output").rmdir()
    (tmp_path / "output").touch()
    with pytest.raises(OutputError, match="cannot write there"):
        run(settings(tmp_path, model))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"input": "nowhere"}, 3, "there is no such folder; mount it"),
        ({"model": "nowhere"}, 4, "no model in"),
        ({"scratch": "nowhere"}, 5, "cannot make a folder there"),
        ({"time-limit": "-3"}, 2, ""),
    ],
)
def test_exit_codes(
    change: dict[str, str], code: int, message: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
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
    errors = done.stderr.splitlines()
    assert message in errors[-1] and (not message or len(errors) == 1), "the platform shows the last line only"


def test_portable_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pickle, the same labels."""
    results = tmp_path / "results"
    model = write_model(results / "Dataset042_Hand" / "MaskSAMTrainer__nnUNetPlans__3d_fullres", folds=2)
    monkeypatch.setenv("nnUNet_results", str(results))
    portable = tmp_path / "portable"
    export_portable("Dataset042_Hand", portable, "MaskSAMTrainer", "nnUNetPlans", folds=("0", "1"))
    write_image(tmp_path / "input/a.nii.gz")
    found = []
    for folder in (model, portable):
        assert run(settings(tmp_path, folder)) == 0
        found.append(labels(tmp_path / "output/a.nii.gz"))
    assert np.array_equal(*found) and len(np.unique(found[0])) > 1


def test_help_is_quick() -> None:
    """The command's help imports neither PyTorch nor nnU-Net."""
    code = (
        "import sys, typer.testing\n"
        "from masksam_nnunet.inference.docker.options import app\n"
        "assert typer.testing.CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'nnunetv2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
