"""Portable models: predictions bit for bit as from nnU-Net's checkpoints, nothing unpickled, nothing half written."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from configs import UNET
from made_up_models import MASKSAM, masksam_model, sign, stock_model, write_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from plain_plans import DATASET
from small_sam import SMALL_SAM, install_small_sam
from torch import Tensor
from typer.testing import CliRunner, Result

from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.errors import MaskSAMError, ModelError, UsageError
from masksam_nnunet.inference.export import write
from masksam_nnunet.inference.export.description import is_portable
from masksam_nnunet.inference.export.install import import_model
from masksam_nnunet.inference.export.load import PortableModel
from masksam_nnunet.inference.export.write import CHECKPOINT, write_portable
from masksam_nnunet.inference.predictor import MaskSAMPredictor
from masksam_nnunet.modeling.sam_network import LEAN

FOLDS = ("0", "1")


class Sound(NamedTuple):
    """Two folds of tiny: as trained, exported to a folder and to a zip file."""

    trained: Path
    folder: Path
    packed: Path


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(EXT_TRAINER, str(trainer_folder()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_results"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    root = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXT_TRAINER, str(trainer_folder()))
        trained = masksam_model(root)
        made = [write_portable(trained, root / name, FOLDS).output for name in ("model", "model.zip")]
    return Sound(trained, *made)


@pytest.fixture()
def model(sound: Sound, tmp_path: Path) -> Path:
    """A copy of the portable folder, to be changed."""
    return Path(shutil.copytree(sound.folder, tmp_path / "model"))


@pytest.fixture()
def trained(sound: Sound, results: Path) -> Path:
    """A copy of the trained model, in nnUNet_results."""
    return Path(shutil.copytree(sound.trained, results / DATASET / MASKSAM))


def predictor(cls: type[nnUNetPredictor]) -> nnUNetPredictor:
    options = {"batch_size": 1} if issubclass(cls, MaskSAMPredictor) else {}
    return cls(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False, **options
    )


def logits(load: Callable[[nnUNetPredictor], None], cls: type[nnUNetPredictor] = nnUNetPredictor) -> Tensor:
    made = predictor(cls)
    load(made)
    return made.predict_logits_from_preprocessed_data(
        torch.randn(1, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    )


def from_nnunet(folder: Path) -> Callable[[nnUNetPredictor], None]:
    return lambda made: made.initialize_from_trained_model_folder(str(folder), (0, 1))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ModelError) as error:
        PortableModel(folder).read()
    assert str(folder) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("kind", ["tiny", "tiny and a U-Net", "ViT, lean", "U-Net"])
def test_predictions_are_nnunets_bit_for_bit(
    kind: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "U-Net":
        folder = stock_model(results)
    elif kind.startswith("tiny"):
        folder = masksam_model(results, **({"generator": UNET} if "U-Net" in kind else {}))
    else:
        monkeypatch.setitem(BACKBONES, "vit_b", SMALL_SAM)
        folder = masksam_model(results, "vit_b", sam=install_small_sam(tmp_path / "cache", monkeypatch))
    expected = logits(from_nnunet(folder))
    output = tmp_path / "portable"
    assert write_portable(folder, output, FOLDS).completed == (kind == "ViT, lean")
    sam = json.loads((output / "model.json").read_text())["sam"]
    assert (sam["name"], sam["licence"]) == ("sam_vit_b", "Apache-2.0") if kind == "ViT, lean" else not sam
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    shutil.move(folder, tmp_path / "away")
    for cls in (nnUNetPredictor, MaskSAMPredictor):
        assert torch.equal(logits(PortableModel(output).load, cls), expected), cls
    one = predictor(nnUNetPredictor)
    PortableModel(output, [1]).load(one)
    assert len(one.list_of_parameters) == 1 and one.allowed_mirroring_axes == (0, 2)
    state = safetensors.torch.load_file(output / "fold_1.safetensors")
    if kind.startswith("ViT"):
        shared = safetensors.torch.load_file(output / "shared.safetensors")
        frozen = {name for name, p in one.network.named_parameters() if not p.requires_grad}
        assert frozen and frozen <= shared.keys() and not frozen & state.keys()
        assert not {name for name, p in one.network.named_parameters() if p.requires_grad and p.any()} & shared.keys()
    if "U-Net" in kind:
        assert not any(".all_modules." in name or "decoder.encoder." in name for name in state), "stored once"
    installed, _ = import_model(output, results)
    assert installed == results / DATASET / folder.name
    assert torch.equal(logits(from_nnunet(installed)), expected)
    for fold in FOLDS:
        checkpoint = torch.load(installed / f"fold_{fold}" / CHECKPOINT, weights_only=True)  # nothing but plain types
        before = torch.load(tmp_path / "away" / f"fold_{fold}" / CHECKPOINT, weights_only=True)["network_weights"]
        before.pop(LEAN, None)
        assert all(torch.equal(checkpoint["network_weights"][name], value) for name, value in before.items())
    assert (installed / "plans.json").read_bytes() == (tmp_path / "away" / "plans.json").read_bytes()


def test_the_same_model_gives_the_same_bytes(sound: Sound, tmp_path: Path) -> None:
    again = write_portable(sound.trained, tmp_path / "again.zip", FOLDS).output
    assert again.read_bytes() == sound.packed.read_bytes()
    shutil.unpack_archive(again, tmp_path / "unpacked")
    contents = [{file.name: file.read_bytes() for file in d.iterdir()} for d in (sound.folder, tmp_path / "unpacked")]
    assert contents[0] == contents[1]
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in sound.folder.iterdir()} == {0o666 & ~umask}


def test_importing_and_predicting_unpickle_nothing(
    sound: Sound, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    write_image(tmp_path / "images" / "case_0000.nii.gz", size=(32, 32, 4))
    # What is imported on the way may use pickle.
    importlib.import_module("masksam_nnunet.inference.predict.run")
    logits(PortableModel(sound.folder).load)
    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)
    with pytest.raises(AssertionError, match="unpickled"):  # the guard notices
        logits(from_nnunet(sound.trained))
    import_model(sound.packed, results)
    words = f"-i {tmp_path}/images -o {tmp_path}/out -device cpu -npp 0 -nps 0 --disable_tta".split()
    done = run("predict", "--model", sound.folder, *words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "case.nii.gz").is_file()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_export_and_import(
    sound: Sound, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "out" / "model.zip"
    words = ["export", "-d", DATASET, "-f", "0", "1", "--format", "safetensors", "-o", packed]
    done = run(*words)
    assert done.exit_code == 0 and done.stdout == f"{packed}\n", done.output
    assert list(packed.parent.iterdir()) == [packed]
    again = run(*words)
    assert again.exit_code == 1 and str(packed) in again.stderr and "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0
    done = run("import", packed, "--to", tmp_path / "else")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'else' / DATASET / MASKSAM}\n", done.output
    assert f"-d {DATASET} -c 3d_fullres -tr MaskSAMTrainer -p nnUNetPlans -f 0 1" in done.stderr
    done = run("import", packed)
    assert done.exit_code == 1 and str(trained) in done.stderr
    done = run("import", packed, "--unpack", tmp_path / "unpacked")
    assert done.exit_code == 0 and PortableModel(tmp_path / "unpacked").folds == FOLDS
    assert run("import", packed, "--unpack", "x", "--force").exit_code == 2
    monkeypatch.delenv("nnUNet_results")
    done = run("import", packed)
    assert done.exit_code == 1 and "nnUNet_results" in done.stderr


def test_predict_with_a_model_takes_no_other(sound: Sound, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    words = f"-i {tmp_path}/images -o {tmp_path}/out -device cpu".split()
    for model, more, said in (
        (sound.folder, ["-d", "4"], "-d"),
        (sound.folder, ["-f", "0", "7"], "7"),
        (sound.folder, ["--postprocessing", "auto"], "--postprocessing"),
        (tmp_path / "images", [], "model.json"),
    ):
        done = run("predict", "--model", model, *words, *more)
        assert done.exit_code != 0 and said in done.stderr, done.output
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_portable_is_refused_and_nothing_is_left(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "model"

    def refused(said: str, *words: str) -> None:
        done = run("export", "-d", DATASET, "--format", "safetensors", "-o", output, *words)
        assert done.exit_code == 1 and said in done.stderr, done.output
        assert not output.exists()

    refused("-f 0 1", "-f", "0", "1", "2")
    other = torch.load(trained / "fold_1" / CHECKPOINT, weights_only=True)
    name, *_ = other["network_weights"]
    lacking = {key: value for key, value in other["network_weights"].items() if key != name}
    for content, said in (
        (other | {"inference_allowed_mirroring_axes": (0, 1, 2)}, "inference_allowed_mirroring_axes"),
        (other | {"network_weights": lacking}, name),
        (other | {"network_weights": other["network_weights"] | {name: "text"}}, name),
        ({"network_weights": other["network_weights"]}, "trainer_name"),
    ):
        torch.save(content, trained / "fold_1" / CHECKPOINT)
        refused(said, "-f", "0", "1")
    torch.save(other, trained / "fold_1" / CHECKPOINT)
    plans = json.loads((trained / "plans.json").read_text())
    plans["configurations"]["2d"] = plans["configurations"]["3d_fullres"]
    (trained / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": "MyReader"}))
    refused("MyReader", "-f", "0", "1")
    (trained / "plans.json").write_text(json.dumps(plans))
    shutil.copytree(trained, trained.with_name(trained.name.replace("3d_fullres", "2d")))
    refused("2d", "-f", "0")


def test_an_export_that_fails_leaves_what_was_there(sound: Sound, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = model.parent / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(UsageError, match=str(thesis.parent)):
        write_portable(sound.trained, thesis.parent, FOLDS, force=True)
    assert thesis.exists()
    before = {file: file.read_bytes() for file in model.iterdir()}, set(model.parent.iterdir())

    def full_disk(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name, stop, kind in (("save_file", full_disk, MaskSAMError), ("write_json", interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(write, name, stop)
            for target in (model, model.with_suffix(".zip")):
                with pytest.raises(kind):
                    write_portable(sound.trained, target, FOLDS, force=True)
    assert before == ({file: file.read_bytes() for file in model.iterdir()}, set(model.parent.iterdir()))


def test_an_import_that_fails_leaves_what_was_there(
    sound: Sound, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = import_model(sound.folder, results)
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    with pytest.raises(UsageError, match=str(folder)):
        import_model(sound.folder, results)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        for target in (results, tmp_path / "new"):
            with pytest.raises(UsageError, match=str(target)):
                import_model(sound.folder, target, force=True)
    assert before == {file: file.read_bytes() for file in folder.rglob("*.*")}
    assert list(folder.parent.iterdir()) == [folder] and not list((tmp_path / "new").iterdir())
    (folder / "plans.json").unlink()
    with pytest.raises(UsageError, match=str(folder)):
        import_model(sound.folder, results, force=True)
    assert (folder / "fold_0" / CHECKPOINT).is_file()


# --- what comes from elsewhere ----------------------------------------------------------------------------------------


def test_files_that_are_not_those_that_were_written(model: Path) -> None:
    for name in ("plans.json", "dataset.json", "shared.safetensors", "fold_1.safetensors"):
        file = model / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        refused(model, str(file))
        file.unlink()
        refused(model, str(file))
        file.write_bytes(before)
    (model / "fold_1.safetensors").unlink()
    assert len(PortableModel(model, [0]).read()[1]) == 1, "what is not asked for is not needed"


def test_damaged_headers_of_weights(model: Path) -> None:
    """Signed by someone who means harm: only the library's reader is left to refuse them."""
    file = model / "fold_1.safetensors"
    before = file.read_bytes()
    for content in (
        b"",
        before[:100],
        (2**62).to_bytes(8, "little") + before[8:],
        before[:8] + before[8:].replace(b"{", b"[", 1),
        before.replace(b"data_offsets", b"data_offsetz", 1),
        before.replace(b'"F32"', b'"Z99"', 1),
        before[:-4],
    ):
        assert content != before
        file.write_bytes(content)
        sign(model)
        refused(model, "fold_1.safetensors")


PLAIN_UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def network(name: str, imported: tuple[str, ...] = (), **arguments: Any) -> dict[str, Any]:
    arguments = {"strides": [[1] * 3]} | arguments
    return {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": list(imported)}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model", "format", "other"), ("model", "format_version", 2), ("model", "folds", ["../1"]),
        ("model", "dataset", "Dataset001_../../x"), ("model", "plans", "a__b"), ("model", "configuration", "x/y"),
        ("model", "trainer", "os.system"), ("model", "trainer", "nnUNetDataLoader"),
        ("model", "mirroring_axes", [3]), ("model", "files", {}),
        ("plans", "image_reader_writer", "np"), ("plans", "label_manager", "torch"), ("plans", "configurations", []),
        ("plans", "dataset_name", "Dataset001_Other"), ("dataset", "file_ending", "/../../x.nii.gz"),
        ("dataset", "labels", None), ("dataset", "channel_names", None), ("3d_fullres", "preprocessor_name", "isfile"),
        ("3d_fullres", "resampling_fn_data", "recursive_find_python_class"),
        ("3d_fullres", "normalization_schemes", ["np"]), ("3d_fullres", "patch_size", [4096] * 3),
        ("3d_fullres", "architecture", network("subprocess.Popen", args=["touch", "made"])),
        ("3d_fullres", "architecture", network("dynamic_network_architectures.architectures.unet.torch")),
        ("3d_fullres", "architecture", network(PLAIN_UNET, ("conv_op",), conv_op="os.system")),
        ("3d_fullres", "architecture", network(PLAIN_UNET, n_stages=10**9)),
    ],
)  # fmt: skip
def test_json_that_cannot_be(model: Path, file: str, key: str, value: Any) -> None:
    name = "plans" if file == "3d_fullres" else file
    content = json.loads((model / f"{name}.json").read_text())
    (content["configurations"][file] if file == "3d_fullres" else content)[key] = value
    (model / f"{name}.json").write_text(json.dumps(content))
    if name != "model":
        sign(model)
    refused(model, "dataset.json" if file == "dataset" else key)
    assert is_portable(model) == (key != "format")


def test_a_unet_that_would_take_ages_to_build(model: Path) -> None:
    content = json.loads((model / "plans.json").read_text())
    arguments = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for stages, blocks, said in ((2, 10**4, "generator.unet.blocks.0 = 10000"), (10**4, 1, "2 to 32 stages")):
        sizes = {"features": 8, "kernel_sizes": [1] * 3, "strides": [1] * 3, "blocks": blocks}
        large = {name: [size] * stages for name, size in sizes.items()}
        arguments["config"]["generator"] = {**large, "kind": "unet", "residual": False}
        (model / "plans.json").write_text(json.dumps(content))
        sign(model)
        refused(model, said)


def test_weights_of_another_network_and_endless_json(model: Path) -> None:
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
    (model / "dataset.json").write_text("[" * 100_000)  # JSON without an end
    sign(model)
    refused(model, "dataset.json")


def test_folds_are_named_or_all(sound: Sound) -> None:
    assert PortableModel(sound.folder, ["1", 1]).folds == ("1",)
    for folds in ([2], ["all"], []):
        with pytest.raises(ModelError, match="0 1"):
            PortableModel(sound.folder, folds).check()
