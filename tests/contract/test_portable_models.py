"""Portable models: predictions bit for bit as from nnU-Net's checkpoints, nothing unpickled, nothing half written."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from container_models import write_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from plain_plans import DATASET
from portable_models import MASKSAM, masksam_model, sign, stock_model
from small_sam import SMALL_SAM, install_small_sam
from torch import Tensor
from typer.testing import CliRunner, Result

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import ModelError, UsageError
from masksam_nnunet.inference.export import write
from masksam_nnunet.inference.export.description import is_portable
from masksam_nnunet.inference.export.install import import_model, unpack_model
from masksam_nnunet.inference.export.load import load_portable, read_model
from masksam_nnunet.inference.export.write import CHECKPOINT, write_portable
from masksam_nnunet.inference.predictor import MaskSAMPredictor
from masksam_nnunet.modeling.network import LEAN

FOLDS = ("0", "1")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "nnUNet_results"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable model of two folds of tiny."""
    root = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXT_TRAINER, str(trainer_folder()))
        return write_portable(masksam_model(root), root / "model", FOLDS).output


@pytest.fixture()
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def predictor(cls: type[nnUNetPredictor]) -> nnUNetPredictor:
    options = {"batch_size": 1} if issubclass(cls, MaskSAMPredictor) else {}
    return cls(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, **options)


def logits(load: Callable[[nnUNetPredictor], None], cls: type[nnUNetPredictor] = nnUNetPredictor) -> Tensor:
    made = predictor(cls)
    load(made)
    return made.predict_logits_from_preprocessed_data(
        torch.randn(1, 4, 40, 32, generator=torch.Generator().manual_seed(0))
    )


def from_nnunet(folder: Path) -> Callable[[nnUNetPredictor], None]:
    return lambda made: made.initialize_from_trained_model_folder(str(folder), (0, 1))


def from_portable(folder: Path) -> Callable[[nnUNetPredictor], None]:
    return lambda made: load_portable(made, folder)


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.mark.parametrize("kind", ["tiny", "ViT", "ViT, lean", "U-Net"])
def test_predictions_are_nnunets_bit_for_bit(
    kind: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "U-Net":
        folder = stock_model(results)
    elif kind == "tiny":
        folder = masksam_model(results)
    else:
        monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)
        sam = install_small_sam(tmp_path / "cache", monkeypatch) if kind == "ViT, lean" else None
        folder = masksam_model(results, "vit_b", sam=sam)
    expected = logits(from_nnunet(folder))
    output = tmp_path / "portable"
    done = write_portable(folder, output, FOLDS)
    assert done.completed == (kind == "ViT, lean")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    shutil.move(folder, tmp_path / "away")
    for cls in (nnUNetPredictor, MaskSAMPredictor):
        assert torch.equal(logits(from_portable(output), cls), expected), cls
    one = predictor(nnUNetPredictor)
    load_portable(one, output, [1])
    assert len(one.list_of_parameters) == 1 and one.allowed_mirroring_axes == (0, 2)
    state = safetensors.torch.load_file(output / "fold_1.safetensors")
    if kind.startswith("ViT"):
        shared = safetensors.torch.load_file(output / "shared.safetensors")
        frozen = {name for name, p in one.network.named_parameters() if not p.requires_grad}
        assert frozen and frozen <= shared.keys() and not frozen & state.keys()
        assert not {name for name, p in one.network.named_parameters() if p.requires_grad and p.any()} & shared.keys()
    if kind == "U-Net":
        assert not any(name.startswith("decoder.encoder.") for name in state), "a tensor with two names is stored once"
    import_model(output, results)
    installed = results / DATASET / folder.name
    assert torch.equal(logits(from_nnunet(installed)), expected)
    for fold in FOLDS:
        checkpoint = torch.load(installed / f"fold_{fold}" / CHECKPOINT, weights_only=True)  # nothing but plain types
        before = torch.load(tmp_path / "away" / f"fold_{fold}" / CHECKPOINT, weights_only=True)["network_weights"]
        before.pop(LEAN, None)
        assert all(torch.equal(checkpoint["network_weights"][name], value) for name, value in before.items())
    assert (installed / "plans.json").read_bytes() == (tmp_path / "away" / "plans.json").read_bytes()


def test_the_same_model_gives_the_same_bytes(results: Path, tmp_path: Path) -> None:
    folder = masksam_model(results)
    for name in ("one", "two"):
        write_portable(folder, tmp_path / f"{name}.zip", FOLDS)
        write_portable(folder, tmp_path / name, FOLDS)
        assert write_portable(folder, tmp_path / name, FOLDS, force=True).output.is_dir()
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "one").iterdir()} == {0o666 & ~umask}


def test_importing_and_predicting_unpickle_nothing(
    results: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    folder = masksam_model(tmp_path)
    write_portable(folder, tmp_path / "model.zip", FOLDS)
    write_image(tmp_path / "images" / "case_0000.nii.gz", size=(32, 32, 4))
    # What is imported on the way may use pickle.
    importlib.import_module("masksam_nnunet.inference.predict.run")
    logits(from_portable(sound))
    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)
    with pytest.raises(AssertionError, match="unpickled"):  # the guard notices
        logits(from_nnunet(folder))
    unpack_model(tmp_path / "model.zip", tmp_path / "unpacked")
    import_model(tmp_path / "model.zip", results)
    logits(from_portable(tmp_path / "unpacked"), MaskSAMPredictor)
    words = f"-i {tmp_path}/images -o {tmp_path}/out -device cpu -npp 0 -nps 0 --disable_tta".split()
    done = run("predict", "--model", sound, *words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "case.nii.gz").is_file()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_from_export_to_prediction(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = masksam_model(results)
    expected = logits(from_nnunet(folder))
    packed = tmp_path / "out" / "model.zip"
    words = ["export", "-d", DATASET, "-f", "0", "1", "--format", "safetensors", "-o", packed]
    done = run(*words)
    assert done.exit_code == 0 and done.stdout == f"{packed}\n", done.output
    assert list(packed.parent.iterdir()) == [packed]
    again = run(*words)
    assert again.exit_code == 1 and str(packed) in again.stderr and "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0
    done = run("import", packed, "--to", tmp_path / "else")
    installed = tmp_path / "else" / DATASET / MASKSAM
    assert done.exit_code == 0 and done.stdout == f"{installed}\n", done.output
    assert f"-d {DATASET} -c 3d_fullres -tr MaskSAMTrainer -p nnUNetPlans -f 0 1" in done.stderr
    assert torch.equal(logits(from_nnunet(installed)), expected)
    done = run("import", packed)
    assert done.exit_code == 1 and str(folder) in done.stderr
    done = run("import", packed, "--unpack", tmp_path / "unpacked")
    assert done.exit_code == 0 and torch.equal(logits(from_portable(tmp_path / "unpacked")), expected)
    assert run("import", packed, "--unpack", "x", "--force").exit_code == 2
    monkeypatch.delenv("nnUNet_results")
    done = run("import", packed)
    assert done.exit_code == 1 and "nnUNet_results" in done.stderr


def test_predict_with_a_model_takes_no_other(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    words = f"-i {tmp_path}/images -o {tmp_path}/out -device cpu".split()
    for model, more, said in (
        (sound, ["-d", "4"], "-d"),
        (sound, ["-f", "0", "7"], "7"),
        (sound, ["--postprocessing", "auto"], "--postprocessing"),
        (tmp_path / "images", [], "model.json"),
    ):
        done = run("predict", "--model", model, *words, *more)
        assert done.exit_code != 0 and said in done.stderr, done.output
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_portable_is_refused_and_nothing_is_left(results: Path, tmp_path: Path) -> None:
    folder = masksam_model(results)
    output = tmp_path / "out" / "model"

    def refused(said: str, *words: str) -> None:
        done = run("export", "-d", DATASET, "--format", "safetensors", "-o", output, *words)
        assert done.exit_code == 1 and said in done.stderr, done.output
        assert not output.exists()

    refused("-f 0 1", "-f", "0", "1", "2")
    other = torch.load(folder / "fold_1" / CHECKPOINT, weights_only=True)
    name, *_ = other["network_weights"]
    lacking = {key: value for key, value in other["network_weights"].items() if key != name}
    for content, said in (
        (other | {"inference_allowed_mirroring_axes": (0, 1, 2)}, "inference_allowed_mirroring_axes"),
        (other | {"network_weights": lacking}, name),
        ({"network_weights": other["network_weights"]}, "trainer_name"),
    ):
        torch.save(content, folder / "fold_1" / CHECKPOINT)
        refused(said, "-f", "0", "1")
    torch.save(other, folder / "fold_1" / CHECKPOINT)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["2d"] = plans["configurations"]["3d_fullres"]
    (folder / "plans.json").write_text(json.dumps(plans))
    shutil.copytree(folder, folder.with_name(folder.name.replace("3d_fullres", "2d")))
    refused("2d 3d_fullres", "-f", "0")


def test_an_export_that_fails_leaves_what_was_there(
    sound: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = masksam_model(results), tmp_path / "out" / "model"
    output.mkdir(parents=True)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=str(output)):
        write_portable(folder, output, FOLDS, force=True)
    assert (output / "thesis.txt").read_text() == "mine"
    shutil.rmtree(output)
    shutil.copytree(sound, output)
    before = {file: file.read_bytes() for file in output.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name, stop, kind in (("save_file", full_disk, UsageError), ("network_with", interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(write, name, stop)
            for target in (output, output.with_suffix(".zip")):
                with pytest.raises(kind):
                    write_portable(folder, target, FOLDS, force=True)
    assert before == {file: file.read_bytes() for file in output.iterdir()}
    assert list(output.parent.iterdir()) == [output]


def test_an_import_that_fails_leaves_what_was_there(
    results: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = import_model(model, results).folder
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    with pytest.raises(UsageError, match=str(folder)):
        import_model(model, results)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        for target in (results, tmp_path / "new"):
            with pytest.raises(UsageError, match=str(target)):
                import_model(model, target, force=True)
    assert before == {file: file.read_bytes() for file in folder.rglob("*.*")}
    assert list(folder.parent.iterdir()) == [folder] and not list((tmp_path / "new").iterdir())
    (folder / "plans.json").unlink()
    with pytest.raises(UsageError, match=str(folder)):
        import_model(model, results, force=True)
    assert (folder / "fold_0" / CHECKPOINT).is_file()


# --- what comes from elsewhere ----------------------------------------------------------------------------------------


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ModelError) as error:
        read_model(folder)
    assert str(folder) in str(error.value) and said in str(error.value)


def test_files_that_are_not_those_that_were_written(model: Path) -> None:
    assert is_portable(model) and read_model(model).about.folds == FOLDS
    for name in ("plans.json", "dataset.json", "shared.safetensors", "fold_1.safetensors"):
        file = model / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        refused(model, str(file))
        file.rename(model / "away")
        refused(model, str(file))
        file.symlink_to("away")
        refused(model, str(file))
        file.unlink()
        (model / "away").unlink()
        file.write_bytes(before)
    assert len(read_model(model).states) == 2
    (model / "fold_1.safetensors").unlink()
    assert read_model(model, [0]).about.folds == ("0",), "what is not asked for is not needed"


UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def network(name: str, imported: tuple[str, ...] = (), **arguments: Any) -> dict[str, Any]:
    arguments = {"strides": [[1] * 3]} | arguments
    return {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": list(imported)}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model", "format", "other"), ("model", "format_version", 2), ("model", "folds", ["../1"]),
        ("model", "dataset", "Dataset001_../../x"), ("model", "plans", "a__b"), ("model", "configuration", "x/y"),
        ("model", "trainer", "os.system"), ("model", "trainer", "nnUNetDataLoader"), ("model", "epochs", {"7": 1}),
        ("model", "mirroring_axes", [3]), ("model", "same_as", {"a": "b"}), ("model", "files", {}),
        ("plans", "image_reader_writer", "np"), ("plans", "label_manager", "torch"), ("plans", "configurations", []),
        ("plans", "transpose_forward", [0, 1, 1]), ("plans", "dataset_name", "Dataset001_Other"),
        ("plans", "foreground_intensity_properties_per_channel", {}),
        ("dataset", "file_ending", "/../../x.nii.gz"), ("dataset", "labels", {"background": 0, "a": 10**9}),
        ("dataset", "labels", None), ("dataset", "channel_names", {}), ("dataset", "regions_class_order", "12"),
        ("3d_fullres", "preprocessor_name", "isfile"), ("3d_fullres", "resampling_fn_seg_kwargs", {"odd": 1}),
        ("3d_fullres", "resampling_fn_data", "recursive_find_python_class"), ("3d_fullres", "spacing", [1.0, 1.0]),
        ("3d_fullres", "normalization_schemes", ["np"]), ("3d_fullres", "patch_size", [4096] * 3),
        ("3d_fullres", "architecture", network("subprocess.Popen", args=["touch", "made"])),
        ("3d_fullres", "architecture", network("dynamic_network_architectures.architectures.unet.torch")),
        ("3d_fullres", "architecture", network(UNET, ("conv_op",), conv_op="os.system")),
        ("3d_fullres", "architecture", network(UNET, n_stages=10**9)),
    ],
)  # fmt: skip
def test_json_that_cannot_be(model: Path, file: str, key: str, value: Any) -> None:
    name = "plans" if file == "3d_fullres" else file
    content = json.loads((model / f"{name}.json").read_text())
    (content["configurations"][file] if file == "3d_fullres" else content)[key] = value
    (model / f"{name}.json").write_text(json.dumps(content))
    if key == "architecture":
        description = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps(description | {"network": value}))
    if name != "model":
        sign(model)
    refused(model, key)
    assert is_portable(model) == (key != "format")


def test_endless_nesting_and_nan(model: Path) -> None:
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 1.0, "std": float("nan")}}
    (model / "plans.json").write_text(json.dumps(plans))
    sign(model)
    refused(model, "foreground_intensity_properties_per_channel")
    (model / "dataset.json").write_text("[" * 100_000)
    sign(model)
    refused(model, "dataset.json")


def test_weights_of_another_network(model: Path) -> None:
    file = model / "fold_1.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    lacking = {key: value for key, value in tensors.items() if key != name}
    for content, said in (
        (lacking, name),
        (tensors | {"more": torch.ones(1)}, "more"),
        (tensors | {name: torch.ones(3)}, name),
    ):
        safetensors.torch.save_file(content, file)
        sign(model)
        refused(model, said)


def test_folds_are_named_or_all(model: Path) -> None:
    assert read_model(model, ["1", 1]).about.folds == ("1",)
    for folds in ([2], "all", []):
        with pytest.raises(ModelError, match="0 1"):
            read_model(model, folds)
