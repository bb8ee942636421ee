"""The wheel: what is in it, what is not, and that it works where the checkout is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "masksam_nnunet": "masksam_nnunet",
    "plans": "masksam_nnunet/plans",
    "trainers": "masksam_nnunet/trainers",
    "inference": "masksam_nnunet/inference",
    "benchmarks": "masksam_nnunet/benchmarks",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would leave its build folder, and take stale files from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_source_file_is_in_its_place(names: set[str]) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "performance" not in path.parts
        and not re.search(r"\.pyc$|/\.|/Dockerfile$|\.sh$", f"/{path.relative_to(ROOT / folder).as_posix()}")
    }
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == expected


def test_data_files(names: set[str]) -> None:
    assert "masksam_nnunet/py.typed" in names
    assert "masksam_nnunet/trainers/nnunet_ext/masksam_ext.py" in names
    assert "masksam_nnunet/trainers/nnunet_ext/__init__.py" not in names
    assert any(name.startswith("masksam_nnunet/inference/report/templates/") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_one_top_level_package(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"masksam_nnunet"}


def test_metadata(wheel: Path, names: set[str]) -> None:
    def read(name: str) -> str:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(next(entry for entry in names if entry.endswith(f".dist-info/{name}"))).decode()

    metadata = read("METADATA")
    for line in ("Name: masksam-nnunet", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in metadata.splitlines()
    assert "Requires-Dist: nnunetv2==2.8.1" in metadata
    assert "Requires-Dist: segment-anything==1.0" in metadata
    assert "masksam = masksam_nnunet.cli.app:main" in read("entry_points.txt")


def run(site: Path, script: str, elsewhere: Path, **variables: str) -> str:
    """Output of ``script`` with the wheel before the checkout, in a folder that is neither."""
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_command_names_the_installed_folder(site: Path, tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['masksam', 'env']; from masksam_nnunet.cli.app import main; main()"
    folder = site / "masksam_nnunet" / "trainers" / "nnunet_ext"
    assert run(site, script, tmp_path, nnUNet_extTrainer="") == f"export nnUNet_extTrainer={folder}\n"


@pytest.mark.integration
def test_the_image_is_checked_with_the_installed_package(site: Path, tmp_path: Path) -> None:
    """By the Dockerfile's own command, in the folder of the sources, where ``masksam_nnunet`` lacks what is mapped."""
    text = (ROOT / "inference" / "docker" / "Dockerfile").read_text()
    (options, code) = re.findall(r'/opt/venv/bin/python((?: -\w)+) "(import [^"]+)"', text)[0]
    venv, sources = tmp_path / "venv", tmp_path / "src"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    # A path alone: the .pth files there, such as that of an editable install, do not count.
    (packages / "others.pth").write_text(f"{site}\n{sysconfig.get_path('purelib')}\n")
    sources.mkdir()
    for folder in FOLDERS:
        (sources / folder).symlink_to(ROOT / folder)
    command = [venv / "bin" / "python", *options.split(), f"{code} as module; print(module.__file__)"]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(site)


@pytest.mark.integration
def test_nnunet_finds_the_installed_trainers(site: Path, tmp_path: Path) -> None:
    """By name, in the scanned folder, and as the classes of the package, not as copies of them."""
    script = (
        "import masksam_nnunet.trainers as trainers\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "for name in ('MaskSAMTrainer', 'MaskSAMTrainer_tiny'):\n"
        "    assert find(name) is getattr(trainers, name), name\n"
        "print('file:', trainers.__file__)\n"
    )
    folder = site / "masksam_nnunet" / "trainers"
    output = run(site, script, tmp_path, nnUNet_extTrainer=str(folder / "nnunet_ext"))
    assert output.splitlines()[-1] == f"file: {folder / '__init__.py'}"
