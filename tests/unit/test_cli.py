"""The ``masksam`` command: what it prints, what it does not import, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from masksam_nnunet import __version__
from masksam_nnunet.cli import app as cli
from masksam_nnunet.environment import EXT_TRAINER, trainer_folder
from masksam_nnunet.sam_files import CHECKPOINTS

MASKSAM = Path(sys.executable).with_name("masksam")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MASKSAM_WEIGHTS", "MASKSAM_WEIGHTS_SHA256", "MASKSAM_WEIGHTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKSAM_CACHE", str(tmp_path / "cache"))
    # Set, then deleted: so that what a command writes there is undone after the test.
    monkeypatch.setenv(EXT_TRAINER, "")
    monkeypatch.delenv(EXT_TRAINER)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def error_line(result: Result) -> str:
    """The message of a command that failed as it should: a line on stderr, nothing on stdout, exit code 1."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit) and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\n"
        "from masksam_nnunet.cli.app import main\n"
        "for words in ('--help', '--version', 'env', 'predict --help', 'demo --help', 'data --help'):\n"
        "    sys.argv = ['masksam', *words.split()]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, words\n"
        "heavy = {'torch', 'nnunetv2', 'numpy', 'scipy', 'requests', 'matplotlib', 'segment_anything'}\n"
        "print('imported:', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported: []", done


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"masksam {__version__}\n")


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
    odd = '/other trainers/it\'s $HOME `x` "y"' + os.pathsep + "/more"
    assert evaluated_by_sh(f"{line}\n{line}", odd) == ours + os.pathsep + odd
    assert evaluated_by_sh(line, os.pathsep.join(["/more", ours, "/more"])) == ours + os.pathsep + "/more"


def test_env_for_other_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXT_TRAINER, "/it's\\here")
    ours = str(trainer_folder())
    assert invoke("env", "--shell", "fish").stdout == f"set -gx {EXT_TRAINER} '{ours}{os.pathsep}/it\\'s\\\\here'\n"
    assert invoke("env", "--shell", "powershell").stdout == f"$env:{EXT_TRAINER} = '{ours}{os.pathsep}/it''s\\here'\n"
    assert invoke("env", "--shell", "tcsh").exit_code == 2


def test_an_incomplete_installation_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("masksam_nnunet.environment.find_spec", lambda name: spec)
    for command in ("env", "train 4 3d_fullres 0"):
        assert str(tmp_path) in error_line(invoke(*command.split()))


@pytest.mark.parametrize(
    "words",
    [
        *(f"predict -i in -o out {bad}" for bad in ("--batch-size 0", "-step_size far", "-device tpu", "-num_parts 0")),
        *(f"demo {bad}" for bad in ("--minutes 0", "--batch-size 0", "--fold 5", "--bogus")),
    ],
)
def test_values_that_are_refused(words: str) -> None:
    result = invoke(*words.split())
    option = [word for word in words.split() if word.startswith("-")][-1]
    assert result.exit_code == 2 and option in result.stderr


def test_weights_lists_what_there_is() -> None:
    said = invoke("weights", "--list").stdout
    assert all(name in said for name in (*CHECKPOINTS, "Apache-2.0", "ACDC", "lite_medsam.pth"))


def test_weights_errors(tmp_path: Path) -> None:
    source = tmp_path / "other.pth"
    source.write_bytes(b"not SAM")
    assert str(source) in error_line(invoke("weights", "vit_b", "--from", str(source)))
    unknown = invoke("weights", "vit_x")
    assert unknown.exit_code == 2 and all(name in unknown.stderr for name in ("vit_x", "vit_b", "vit_l", "vit_h"))
    both = invoke("weights", "vit_b", "--from", str(source), "--url", "http://127.0.0.1:9/")
    assert both.exit_code == 2 and "--from" in both.stderr and "--url" in both.stderr
