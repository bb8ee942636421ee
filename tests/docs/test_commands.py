"""Every command line of README.md, CONTRIBUTING.md and docs/*.md is accepted by its own parser."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer.main
from documented import PAGES, ROOT, blocks, commands
from parsers import Refused, parse

from masksam_nnunet.inference.docker.__main__ import app as container


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_every_command_line_parses(page: str, tmp_path: Path) -> None:
    refused = []
    for words in commands(page, tmp_path):
        try:
            parse(words)
        except Refused as error:
            refused.append(str(error))
    assert not refused


def test_wrong_lines_are_refused() -> None:
    for line in (
        "masksam plan -d 4 --backbones vit_b",
        "masksam plan -d 4 --backbone vit_x",
        "masksam plan -d 4 --generator heavy",
        "masksam train 4 2d 0 --npy",
        "masksam portray",
        "nnUNetv2_train 4 2d",
        "nnUNetv2_trains 4 2d 0",
        "make tset",
        "unheard_of",
    ):
        with pytest.raises(Refused):
            parse(line.split())


def test_commands_are_in_sh_blocks() -> None:
    """Commands in other blocks would not be tested."""
    for page, text in PAGES.items():
        assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"sh", "json", "python"}, page


def test_variables_are_those_of_the_code() -> None:
    """The pages name every MASKSAM variable that the code reads, and no other."""
    folders = ("masksam_nnunet", "plans", "trainers", "inference", "benchmarks")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh"))
    code = "\n".join(path.read_text(encoding="utf-8") for path in files if "performance" not in path.parts)
    variable = re.compile(r"\bMASKSAM_[A-Z0-9_]+\b")
    options = {f"MASKSAM_{option.name.upper()}" for option in typer.main.get_command(container).params}
    assert set(variable.findall("\n".join(PAGES.values()))) == set(variable.findall(code)) | options


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_cluster_script_requeues_a_training_that_saved(status: int, requeued: bool, tmp_path: Path) -> None:
    programs = {
        "srun": 'test "$SRUN_CPUS_PER_TASK" = 12 && exec "$@"',
        "scontrol": 'echo scontrol "$@" >> calls',
        "masksam": f'echo masksam "$@" >> calls; exit {status}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(
        ["bash", ROOT / "docs" / "cluster" / "train_fold.sh", "27", "3d_fullres", "-p", "MaskSAMPlans"],
        cwd=tmp_path,
        env=variables | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["masksam train 27 3d_fullres 3 -p MaskSAMPlans --c", *(["scontrol requeue 9_3"] * requeued)]


def test_two_methods_train_on_a_core_each(tmp_path: Path) -> None:
    programs = {
        "taskset": 'core=$2; shift 2; on=$core exec "$@"',
        "masksam": 'python3 -c "import os; print(os.cpu_count())" >> cores; echo "${on:-any}: $*" >> calls',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(
        ["bash", ROOT / "benchmarks" / "one_core.sh", "out", "A", "B@P", "-d", "27", "--minutes", "9"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    start = "benchmark -d 27 --minutes 9 -device cpu --out out"
    calls = [f"0: {start}/first --trainers A", f"1: {start}/second --trainers B@P", f"any: {start} --trainers A B@P"]
    assert sorted((tmp_path / "calls").read_text().splitlines()) == calls
    assert set((tmp_path / "cores").read_text().split()) == {"1"}
