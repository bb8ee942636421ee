"""The `masksam` command: what it prints, what it passes on, what it does not import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from masksam_nnunet import __version__
from masksam_nnunet import sam_weights as weights
from masksam_nnunet.backbones import BACKBONES
from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER, ext_trainer_value, trainer_folder
from masksam_nnunet.errors import DataError

MASKSAM = Path(sys.executable).with_name("masksam")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256", "MASKSAM_WEIGHTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    # Set, then deleted: so that what a command writes there is undone after the test.
    monkeypatch.setenv(EXT_TRAINER, "")
    monkeypatch.delenv(EXT_TRAINER)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def one_line_error(result: Result) -> str:
    """The message of a command that failed as it should: a line on stderr, nothing on stdout, exit code 1."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# --- quick ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "--version", "env", "weights --help", "demo --help", "train"])
def test_nothing_heavy_is_imported(arguments: str) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['masksam', *{arguments.split()!r}]\n"
        "from masksam_nnunet.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'nnunetv2', 'numpy', 'scipy', 'requests', 'matplotlib', 'segment_anything'}\n"
        "    print('imported:', sorted(heavy & sys.modules.keys()))\n"
    )
    bare = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=bare)
    assert done.stdout.splitlines()[-1] == "imported: []", done


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"masksam {__version__}\n")


# --- env --------------------------------------------------------------------------------------------------------------


def evaluated_by_sh(lines: str, current: str | None) -> str:
    """nnUNet_extTrainer as a program started by a shell sees it, after ``lines``."""
    environment = {key: value for key, value in os.environ.items() if key != EXT_TRAINER}
    environment["PATH"] = f"{MASKSAM.parent}{os.pathsep}{environment['PATH']}"
    if current is not None:
        environment[EXT_TRAINER] = current
    child = f'{sys.executable} -c \'import os; print(os.environ["{EXT_TRAINER}"], end="")\''
    script = ["sh", "-euc", f"{lines}\n{child}"]
    return subprocess.run(script, check=True, capture_output=True, text=True, env=environment).stdout


def test_env_is_evaluated_by_a_shell() -> None:
    ours = str(trainer_folder())
    line = 'eval "$(masksam env)"'
    assert evaluated_by_sh(line, None) == ours
    assert evaluated_by_sh(f"{line}\n{line}", None) == ours
    odd = '/other trainers/it\'s $HOME `x` "y"' + os.pathsep + "/more"
    assert evaluated_by_sh(f"{line}\n{line}", odd) == ours + os.pathsep + odd
    assert evaluated_by_sh(line, os.pathsep.join(["/more", ours, "/more"])) == ours + os.pathsep + "/more"
    assert evaluated_by_sh(line, "") == ours


def test_the_folder_is_the_one_to_scan() -> None:
    folder = trainer_folder()
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"masksam_ext.py"}
    assert ext_trainer_value(ext_trainer_value("/a")) == ext_trainer_value("/a")


def test_an_incomplete_installation_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("masksam_nnunet.environment.find_spec", lambda name: spec)
    assert "install the package again" in one_line_error(invoke("env"))
    assert "install the package again" in one_line_error(invoke("train", "4", "3d_fullres", "0"))


def test_env_for_other_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXT_TRAINER, "/it's\\here")
    ours = str(trainer_folder())
    assert invoke("env", "--shell", "fish").stdout == f"set -gx {EXT_TRAINER} '{ours}{os.pathsep}/it\\'s\\\\here'\n"
    assert invoke("env", "--shell", "powershell").stdout == f"$env:{EXT_TRAINER} = '{ours}{os.pathsep}/it''s\\here'\n"
    assert invoke("env", "--shell", "tcsh").exit_code == 2


# --- train and predict ------------------------------------------------------------------------------------------------


class Called(Exception):
    """Raised in place of nnU-Net's command."""


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """nnU-Net's commands replaced: a list of (module:function, sys.argv, nnUNet_extTrainer) of the calls."""
    calls: list[tuple[str, list[str], str]] = []

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, entry: str) -> Any:
            return lambda: calls.append((f"{self.name}:{entry}", list(sys.argv), os.environ[EXT_TRAINER]))

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(cli, "import_module", Module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return calls


TRAIN = "4 3d_fullres 0"
PREDICT = "-i in -o out -d 4 -c 3d_fullres"


@pytest.mark.parametrize(
    "arguments",
    [
        f"train {TRAIN} -tr MaskSAMTrainer_tiny -p MaskSAMPlans --npz --c -num_gpus 2 -device cpu",
        f"train -tr=X {TRAIN} --val",
        f"train {TRAIN} -t X --val_best --disable_checkpointing -pretrained_weights a/b.pth",
        f"predict {PREDICT} -f 0 1 2 -tr X --disable_tta --save_probabilities -chk checkpoint_best.pth -npp 0",
        f"predict {PREDICT} -f all -step_size 0.75 -tr X --verbose --unknown=3 -xyz",
        "train --help",
    ],
)
def test_everything_is_passed_on(nnunet: list[tuple[str, list[str], str]], arguments: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 0, result.output
    ((_, argv, ext_trainer),) = nnunet
    assert argv[0] == f"masksam {arguments.split()[0]}"
    assert argv[1:] == arguments.split()[1:]
    assert ext_trainer == str(trainer_folder())
    assert result.output == ""


@pytest.mark.parametrize("arguments", [f"train {TRAIN} --val", f"predict {PREDICT} -f 0 1"])
def test_the_trainer_defaults_to_ours(nnunet: list[tuple[str, list[str], str]], arguments: str) -> None:
    result = invoke(*arguments.split())
    ((_, argv, _),) = nnunet
    assert argv[1:] == [*arguments.split()[1:], "-tr", "MaskSAMTrainer"]
    assert result.stdout == ""
    assert "MaskSAMTrainer" in result.stderr


def test_the_commands_called_are_nnunets_own(nnunet: list[tuple[str, list[str], str]]) -> None:
    invoke("train", *TRAIN.split())
    invoke("predict", *PREDICT.split())
    for called, command in zip((name for name, _, _ in nnunet), ("nnUNetv2_train", "nnUNetv2_predict"), strict=True):
        module, entry = called.split(":")
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        functions = {node.name for node in ast.parse(Path(spec.origin).read_text()).body if hasattr(node, "name")}
        assert entry in functions
        script = Path(sys.executable).with_name(command).read_text()
        assert f"from {module} import {entry}" in script


@pytest.mark.parametrize(("arguments", "missing"), [(TRAIN, "nnUNet_preprocessed"), (TRAIN, "nnUNet_results")])
def test_missing_folders_are_named(
    nnunet: list[Any], monkeypatch: pytest.MonkeyPatch, arguments: str, missing: str
) -> None:
    monkeypatch.delenv(missing)
    message = one_line_error(invoke("train", *arguments.split()))
    assert message.startswith(f"error: {missing} not set")
    assert all(name in message for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"))
    assert nnunet == []
    assert invoke("train", "--help").exit_code == 0


@pytest.mark.parametrize("words", ["", "-device cuda"])
def test_training_without_a_gpu_stops_at_once(nnunet: list[Any], monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = one_line_error(invoke("train", *TRAIN.split(), *words.split()))
    assert "cuda: PyTorch" in message and "sees no GPU here" in message and "-device cpu" in message
    assert nnunet == []
    assert invoke("train", *TRAIN.split(), "-device", "cpu").exit_code == 0
    assert len(nnunet) == 1


def test_prediction_needs_the_results_only(nnunet: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.delenv("nnUNet_preprocessed")
    assert invoke("predict", *PREDICT.split()).exit_code == 0
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results not set" in one_line_error(invoke("predict", *PREDICT.split()))


@pytest.mark.parametrize(
    ("words", "size"),
    [("", None), ("--batch-size 4", 4), ("--batch-size=12", 12), ("--batch-size 3 --batch-size=5", 5)],
)
@pytest.mark.parametrize("fails", [False, True])
def test_prediction_is_by_our_predictor_for_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch, words: str, size: int | None, fails: bool
) -> None:
    made: list[Any] = []

    def entry() -> None:
        made.append(module.nnUNetPredictor(device=SimpleNamespace(type="cpu"), verbose=True))
        assert sys.argv[1:] == [*PREDICT.split(), "-tr", "X"]
        if fails:
            raise weights.WeightsError("no SAM")

    theirs = {name: object() for name in ("nnUNetPredictor", "get_output_folder", "maybe_mkdir_p")}
    module = SimpleNamespace(predict_entry_point=entry, **theirs)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    result = invoke("predict", *words.split(), *PREDICT.split(), "-tr", "X")
    assert result.exit_code == fails, result.output
    from masksam_nnunet.inference.predictor import MaskSAMPredictor

    (command,) = made
    predictor = command.make_predictor()
    assert isinstance(predictor, MaskSAMPredictor) and predictor.verbose
    assert (predictor.batches and predictor.batches.size) == size
    assert {name: getattr(module, name) for name in theirs} == theirs


@pytest.mark.parametrize("words", ["--batch-size 0", "--batch-size=-2", "--batch-size two", "--batch-size=1.5"])
def test_batch_sizes_that_are_none_are_refused(nnunet: list[Any], words: str) -> None:
    message = one_line_error(invoke("predict", *PREDICT.split(), *words.split()))
    value = words.replace("=", " ").split()[1]
    assert message.startswith(f"error: --batch-size = '{value}' must be a positive whole number")
    assert "leave the option out" in message and nnunet == []
    assert "--batch-size = ''" in one_line_error(invoke("predict", *PREDICT.split(), "--batch-size"))


def test_the_help_of_predict_has_nnunets_options_and_ours(
    nnunet: list[tuple[str, list[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_results")
    result = invoke("predict", "-h")
    ((_, argv, _),) = nnunet
    assert argv == ["masksam predict", "-h"] and result.exit_code == 0
    assert "--batch-size N" in result.stdout


def test_errors_of_weights_and_config_come_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise weights.WeightsError("no SAM checkpoint,\nfetch it")

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run_training_entry=fail, run_training=None))
    result = invoke("train", *TRAIN.split(), "-tr", "X", "-device", "cpu")
    assert result.exit_code == 1 and result.stderr == "error: no SAM checkpoint,\nfetch it\n"


def test_spawned_workers_find_the_trainers(tmp_path: Path) -> None:
    """The console script survives being imported again by a worker, and the worker has the variable."""
    folder = tmp_path / "fake" / "nnunetv2" / "run"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "run_training.py").write_text(
        "import multiprocessing, os, sys\n"
        "def work(queue):\n"
        f"    queue.put((sys.argv[1:], os.environ['{EXT_TRAINER}']))\n"
        "run_training = None\n"
        "def run_training_entry():\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    worker = context.Process(target=work, args=(queue,))\n"
        "    worker.start()\n"
        "    print(*queue.get(timeout=60))\n"
        "    worker.join()\n"
        "    sys.exit(worker.exitcode)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "fake")}
    command = [str(MASKSAM), "train", "4", "2d", "0", "-tr", "X", "-device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"['4', '2d', '0', '-tr', 'X', '-device', 'cpu'] {trainer_folder()}\n"


# --- weights and demo -------------------------------------------------------------------------------------------------


def test_weights_prints_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "sam.pth"
    source.write_bytes(b"SAM")
    sha256 = "0123"
    monkeypatch.setattr(weights, "_sha256", lambda path: sha256)
    checkpoint = replace(weights.released("vit_b"), file_name="sam.pth", sha256=sha256)
    monkeypatch.setitem(BACKBONES, "vit_b", replace(BACKBONES["vit_b"], checkpoint=checkpoint))
    result = invoke("weights", "vit_b", "--from", str(source))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'cache' / 'sam.pth'}\n")
    assert (tmp_path / "cache" / "sam.pth").read_bytes() == b"SAM"


def test_weights_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch(backbone: str, *, url: str | None, source: Path | None, force: bool) -> Path:
        calls.append((backbone, url, source, force))
        return Path("there.pth")

    monkeypatch.setattr(weights, "fetch", fetch)
    assert invoke("weights", "vit_h", "--url", "http://mirror/", "--force").stdout == "there.pth\n"
    assert invoke("weights", "vit_l", "--from", "a.pth").exit_code == 0
    assert calls == [("vit_h", "http://mirror/", None, True), ("vit_l", None, Path("a.pth"), False)]


def test_weights_errors(tmp_path: Path) -> None:
    source = tmp_path / "other.pth"
    source.write_bytes(b"not SAM")
    assert "wrong SHA-256" in one_line_error(invoke("weights", "vit_b", "--from", str(source)))
    unknown = invoke("weights", "vit_x")
    assert unknown.exit_code == 2
    assert all(name in unknown.stderr for name in ("vit_x", "vit_b", "vit_l", "vit_h"))
    both = invoke("weights", "vit_b", "--from", str(source), "--url", "http://127.0.0.1:9/")
    assert both.exit_code == 2 and "not both" in both.stderr


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def run_demo(**options: Any) -> Path:
        calls.append(options)
        if options["fold"] > 3:
            raise DataError("no such fold")
        return tmp_path / "report.html"

    stub = ModuleType("masksam_nnunet.benchmarks.demo")
    stub.__dict__.update(run_demo=run_demo)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)

    assert invoke("demo").stdout == f"{tmp_path / 'report.html'}\n"
    invoke("demo", "--data", "raw", "--out", "o", "--minutes", "1.5", "--batch-size", "3", "--fold", "1", "--seed", "7")
    assert calls == [
        {"out": Path("masksam_demo"), "data": None, "minutes": 3.0, "batch_size": 2, "fold": 0, "seed": 0},
        {"out": Path("o"), "data": Path("raw"), "minutes": 1.5, "batch_size": 3, "fold": 1, "seed": 7},
    ]
    assert one_line_error(invoke("demo", "--fold", "4")) == "error: no such fold"
    for bad in (["--minutes", "0"], ["--batch-size", "0"], ["--fold", "-1"], ["--fold", "5"], ["--bogus"]):
        assert invoke("demo", *bad).exit_code == 2
