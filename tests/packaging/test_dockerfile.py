"""The container's Dockerfile: linted, and true to what it names; no container engine is needed."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from masksam_nnunet.inference.docker.__main__ import IN_IMAGE, app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "inference" / "docker"
DOCKERFILE = re.sub(r"(?m)^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text()).replace("\\\n", " ")
INSTRUCTIONS = re.findall(r"(?m)^([A-Z]+) (.*)$", DOCKERFILE)


def arguments(name: str) -> list[str]:
    return [text for instruction, text in INSTRUCTIONS if instruction == name]


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    command = [program, "--failure-threshold", "style", FOLDER / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_images_are_pinned_and_the_user_is_not_root() -> None:
    stages = {text.split(" AS ")[1] for text in arguments("FROM") if " AS " in text}
    images = {text.split(" AS ")[0] for text in arguments("FROM")} - stages
    assert images and all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image) for image in images)
    assert arguments("USER") == ["1000:1000"]


def test_hosts_that_ask_for_it_give_the_container_a_gpu() -> None:
    (text,) = (text for text in arguments("ENV") if "NVIDIA_" in text)
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(text.split())


def test_what_is_copied_is_there_and_gets_into_the_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for text in arguments("COPY") if not text.startswith("--from") for name in text.split()[:-1]}
    assert copied == allowed
    for name in copied:
        assert (ROOT / name).exists()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert {folder.split("/")[0] for folder in packages} <= copied


def test_packages_are_hashed_and_only_tools_are_taken_out() -> None:
    runs = " ".join(arguments("RUN"))
    installs = re.findall(r"pip (?:install|wheel)[^&]*", runs)
    assert installs and all("--no-index" in run or "--require-hashes" in run for run in installs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = " ".join(project["optional-dependencies"]["dev"])
    removed = re.search(r"pip uninstall --yes ([\w -]+?) *&&", runs)
    assert removed and all(tool in tools for tool in removed[1].split())


def test_entry_point_and_variables_are_the_commands() -> None:
    assert arguments("ENTRYPOINT") == ['["python", "-m", "masksam_nnunet.inference.docker"]']
    known = {f"MASKSAM_{option.name.upper()}" for option in typer.main.get_command(app).params}
    assert set(re.findall(r"MASKSAM_\w+", DOCKERFILE)) <= known
    assert any(text.endswith(f" {IN_IMAGE}/") for text in arguments("COPY"))


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A program in Docker's place, which writes down what it is told."""
    program = tmp_path / "docker"
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word" >> "$LOG"; done\necho image\n')
    program.chmod(0o755)
    return program


def container(docker: Path, *words: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    log = docker.with_name("log")
    environment = {**os.environ, "DOCKER": str(docker), "LOG": str(log), **variables}
    done = subprocess.run(
        [FOLDER / "container.sh", *map(str, words)], env=environment, capture_output=True, text=True, cwd=docker.parent
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_script_builds(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    done, words = container(docker, "build", "my model", MIRRORING="false", TAG="other")
    assert done.returncode == 0, done.stderr
    assert words[0] == "build" and words[-1] == str(ROOT)
    assert set(itertools.pairwise(words)) >= {
        ("--file", str(FOLDER / "Dockerfile")),
        ("--tag", "other"),
        ("--build-arg", "MIRRORING=false"),
        ("--target", "with-model"),
        ("--build-context", f"model={tmp_path / 'my model'}"),
    }


def test_script_tries_what_the_platform_does(docker: Path, tmp_path: Path) -> None:
    for name in ("in", "model"):
        (tmp_path / name).mkdir()
    done, words = container(docker, "try", "in", "out put", "model", GPUS="none")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out put").stat().st_mode & 0o007 == 0o007
    volumes = {f"{tmp_path}/in:/input:ro", f"{tmp_path}/out put:/output", f"{tmp_path}/model:/opt/ml/model:ro"}
    assert volumes | {"--read-only", "none", "/tmp"} <= set(words)
    assert "--gpus" not in words and words[-1] == "masksam"


def test_script_saves_whole_files_and_explains_itself(docker: Path, tmp_path: Path) -> None:
    done, words = container(docker, "save", "image.tar.gz")
    assert done.returncode == 0 and words == ["save", "masksam"]
    assert subprocess.run(["gzip", "-dc", tmp_path / "image.tar.gz"], capture_output=True).stdout == b"image\n"
    for wrong in ((), ("try", "in"), ("nonsense",), ("build", "nowhere")):
        done, _ = container(docker, *wrong)
        assert done.returncode == 2 and done.stderr
    assert "container.sh build [MODEL]" in container(docker)[0].stderr
