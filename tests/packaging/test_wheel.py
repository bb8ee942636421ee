"""The wheel holds the package and its data, and works where the checkout is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"masksam_nnunet": "masksam_nnunet"} | {
    folder: f"masksam_nnunet/{folder}" for folder in ("plans", "trainers", "inference", "benchmarks")
}
"""Folders of the checkout, and where the wheel has them."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves a build folder and would take stale files from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_source_file_in_its_place(site: Path) -> None:
    """But not benchmarks/performance and learning, nor the files that build the container."""
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not {"performance", "learning"} & {*path.parts}
        and not re.search(r"\.pyc$|/\.|/Dockerfile$|\.sh$", f"/{path.relative_to(ROOT / folder).as_posix()}")
    }
    shipped = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {name: (site / name).read_bytes() for name in shipped if ".dist-info/" not in name} == expected
    assert {"masksam_nnunet/py.typed", "masksam_nnunet/trainers/nnunet_ext/masksam_ext.py"} <= expected.keys()


def test_metadata(site: Path) -> None:
    (info,) = site.glob("*.dist-info")
    metadata = (info / "METADATA").read_text().splitlines()
    for line in ("Name: masksam-nnunet", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in metadata
    assert "masksam = masksam_nnunet.cli.app:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_the_installed_command_names_the_installed_folder(site: Path, tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['masksam', 'env']; from masksam_nnunet.cli.app import main; main()"
    # The script finds the wheel before the checkout, in a folder that is neither.
    environment = {**os.environ, "PYTHONPATH": str(site), "nnUNet_extTrainer": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    folder = site / "masksam_nnunet" / "trainers" / "nnunet_ext"
    assert done.stdout == f"export nnUNet_extTrainer={folder}\n", done.stderr


def test_the_last_check_of_the_dockerfile_imports_the_installed_package(site: Path) -> None:
    """Isolated (-I): it runs beside the sources, where ``masksam_nnunet`` lacks the mapped folders."""
    text = (ROOT / "inference" / "docker" / "Dockerfile").read_text()
    ((options, module),) = re.findall(r'/opt/venv/bin/python ([-\w ]+) "import ([\w.]+)"', text)
    assert "-I" in options.split()
    assert (site / module.replace(".", "/")).with_suffix(".py").is_file() or (site / module.replace(".", "/")).is_dir()
