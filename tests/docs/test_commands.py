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


def put_programs(folder: Path, programs: dict[str, str]) -> str:
    """Shell scripts by name, and the PATH that finds them first."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_cluster_script_requeues_a_training_that_saved(status: int, requeued: bool, tmp_path: Path) -> None:
    programs = {
        "srun": 'test "$SRUN_CPUS_PER_TASK" = 12 && exec "$@"',
        "scontrol": 'echo scontrol "$@" >> calls',
        "masksam": f'echo masksam "$@" >> calls; exit {status}',
    }
    path = put_programs(tmp_path, programs)
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(
        ["bash", ROOT / "docs" / "cluster" / "train_fold.sh", "27", "3d_fullres", "-p", "MaskSAMPlans"],
        cwd=tmp_path,
        env=variables | {"PATH": path},
    )
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["masksam train 27 3d_fullres 3 -p MaskSAMPlans --c", *(["scontrol requeue 9_3"] * requeued)]


def test_two_methods_train_on_a_core_each(tmp_path: Path) -> None:
    programs = {
        "taskset": 'core=$2; shift 2; on=$core exec "$@"',
        "masksam": """
            python3 -c "import os; print(os.cpu_count())" >> cores
            echo "${on:-any}: $*" >> calls
            trained=$7/train_2/nnUNet_results/Dataset
            if [ -n "$on" ]; then mkdir -p $trained/$9; else ls $trained; fi""",
    }
    path = put_programs(tmp_path, programs)
    script = ["bash", ROOT / "benchmarks" / "one_core.sh", "out", "A", "B@P", "-d", "27"]
    done = subprocess.run(script, cwd=tmp_path, env={"PATH": path}, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["A", "B@P"], "subsets of both, when they are scored"
    start = "benchmark -d 27 -device cpu --out out"
    calls = [f"0: {start}/first --trainers A", f"1: {start}/second --trainers B@P", f"any: {start} --trainers A B@P"]
    assert sorted((tmp_path / "calls").read_text().splitlines()) == calls
    assert set((tmp_path / "cores").read_text().split()) == {"1"}


@pytest.mark.parametrize("what", ["figures", "paths", "trainings"])
@pytest.mark.parametrize("broken", [None, "memory_estimate.py", "theirs", "no GPU"])
def test_the_script_for_a_gpu_goes_on_after_a_failure(what: str, broken: str | None, tmp_path: Path) -> None:
    """With programs that do nothing: what is called, and that all results come back."""
    trained = "results/Dataset$(printf %03d $1)_X/$7__${9:-nnUNetPlans}__3d_fullres/fold_0/validation"
    programs = {
        "python-here": f'echo "$*" >> calls; case "$*" in *"{broken}"*) exit 1;; esac; test "{broken}" != "no GPU"',
        "masksam": 'echo "masksam $*" >> calls',
        "nnUNetv2_plan_and_preprocess": ":",
        "nnUNetv2_preprocess": ":",
        "nnUNetv2_train": f"""
            if [ "{broken}" = theirs ] && [ "$1 $7" = "27 nnUNetTrainer_adamw_budget" ]; then exit 1; fi
            mkdir -p {trained} && echo "{{}}" > {trained}/summary.json""",
    }
    path = put_programs(tmp_path, programs)
    variables = {"PYTHON": "python-here", "PATH": path, "nnUNet_results": str(tmp_path / "results")}
    script = ["bash", ROOT / "benchmarks" / "gpu.sh", what, "out", "1"]
    status = subprocess.run(script, cwd=tmp_path, env=os.environ | variables, capture_output=True).returncode
    calls = (tmp_path / "calls").read_text().splitlines()
    if broken == "no GPU":
        assert status == 1 and len(calls) == 1
        return
    concerned = broken == {"figures": "memory_estimate.py", "trainings": "theirs"}.get(what)
    assert status == (1 if broken and concerned else 0)
    assert (tmp_path / "out" / f"results_{what}.json").is_file()
    cases = [call for call in calls if "bench.py --device cuda" in call]
    assert len(cases) == {"figures": 3, "paths": 3, "trainings": 0}[what]
    if what == "trainings":
        assert (tmp_path / "out" / "results.tar.gz").is_file()
        scored = [call.split()[3] for call in calls if call.startswith("masksam benchmark")]
        assert sorted(scored) == (["101"] if concerned and broken else ["101", "27"])
