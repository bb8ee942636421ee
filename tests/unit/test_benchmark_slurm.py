"""What SLURM is asked for, with a SLURM of shell scripts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from simple_jobs import simple_jobs
from submitit.helpers import DelayedSubmission

from masksam_nnunet.benchmarks import slurm as slurm_module
from masksam_nnunet.benchmarks.slurm import Evaluation, FoldOnSlurm, Slurm, SlurmSettings, parse_slurm_options
from masksam_nnunet.errors import TrainingError, UsageError


def test_slurm_options_are_read() -> None:
    found = parse_slurm_options(["account=lab", "--mail-type=END", "constraint=a=b", "exclusive"])
    assert found == {"account": "lab", "mail_type": "END", "constraint": "a=b", "exclusive": True}
    for wrong in ("", "=x", "account=", "dependency=afterok:1", "open-mode=append"):
        with pytest.raises(UsageError, match="--slurm"):
            parse_slurm_options([wrong])


def test_no_slurm_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="--executor slurm"):
        Slurm(tmp_path, SlurmSettings())


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of shell scripts: sbatch counts, and refuses from the job that REFUSE_FROM names; nothing runs.

    Returns the folder of submitted scripts, by the job's number: a job has ended when its script is removed.
    """
    programs, state = tmp_path / "bin", tmp_path / "state"
    programs.mkdir()
    state.mkdir()
    sbatch = f"""
    n=$(cat {programs}/count 2>/dev/null || echo 0)
    if [ "$n" -ge "${{REFUSE_FROM:-99}}" ]; then echo 'sbatch: error: invalid partition' >&2; exit 1; fi
    echo $((n + 1)) > {programs}/count; cp "$1" {state}/$((100 + n)); echo "Submitted batch job $((100 + n))"
    """
    for name, text in (
        ("sbatch", sbatch),
        ("srun", ""),
        ("squeue", f'for n in $(ls {state}); do echo "$n|PENDING"; done'),
        ("scancel", f"rm {state}/$1"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return state


def test_a_second_run_submits_only_what_is_not_queued(tmp_path: Path, queue: Path) -> None:
    jobs = simple_jobs(tmp_path, "A", "B")
    settings = SlurmSettings("gpu", minutes=90, gpus=2, cpus=6, memory_gb=1.5, options={"account": "lab"})
    first, new = Slurm(tmp_path / "out", settings).submit(jobs, {})
    assert (new, first.evaluation) == ([job.name for job in jobs], "102")
    script = (queue / "100").read_text()
    options = ("partition=gpu", "time=90", "gpus-per-node=2", "cpus-per-task=6", "mem=1536M", "account=lab", "requeue")
    for option in (*options, "job-name=A__P__2d_fold_0", "signal=USR2@90"):
        assert f"#SBATCH --{option}\n" in script, option
    assert "--dependency=afterany:100:101" in (queue / "102").read_text()
    assert Slurm(tmp_path / "out", settings).submit(jobs, {}) == (first, [])

    (queue / "100").unlink()  # it has ended without success: it is submitted again, and the evaluation after it
    third, new = Slurm(tmp_path / "out", settings).submit(jobs, {})
    assert new == [jobs[0].name] and third.folds[jobs[1].name] == "101"
    dependency = f"--dependency=afterany:{third.folds[jobs[0].name]}:101"
    assert dependency in (queue / str(third.evaluation)).read_text() and not (queue / "102").exists()


def test_a_refused_job_keeps_those_before(tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = simple_jobs(tmp_path, "A", "B", "C")
    monkeypatch.setenv("REFUSE_FROM", "2")
    with pytest.raises(TrainingError, match="C__P__2d"):
        Slurm(tmp_path / "out", SlurmSettings()).submit(jobs, {})
    assert list(json.loads((tmp_path / "out" / "jobs.json").read_text())["folds"].values()) == ["100", "101"]
    monkeypatch.delenv("REFUSE_FROM")
    assert Slurm(tmp_path / "out", SlurmSettings()).submit(jobs, {})[1] == [jobs[2].name]
    (tmp_path / "out" / "jobs.json").write_text("[]")
    with pytest.raises(TrainingError, match=r"jobs\.json"):
        Slurm(tmp_path / "out", SlurmSettings()).submit(jobs, {})


def test_a_slurm_that_does_not_answer_is_named(tmp_path: Path, queue: Path) -> None:
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'cannot contact controller' >&2; exit 1\n")
    with pytest.raises(TrainingError, match="cannot contact controller"):
        slurm_module.jobs_in_queue()


def test_a_job_that_left_no_result_has_failed(tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_module, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(slurm_module, "_LOOK_SECONDS", 0.05)
    jobs = simple_jobs(tmp_path, "A")
    cluster = Slurm(tmp_path / "out", SlurmSettings())
    submission, _ = cluster.submit(jobs, {})
    for file in queue.iterdir():
        file.unlink()
    log = tmp_path / "out" / "slurm" / "100" / "100_0_log.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    errors = cluster.wait(submission)
    assert list(errors) == [jobs[0].name, "evaluation"] and "oom_kill" in errors[jobs[0].name]


def test_a_preempted_fold_is_requeued_as_it_is(tmp_path: Path) -> None:
    fold = FoldOnSlurm(simple_jobs(tmp_path, "A")[0])
    delayed = fold.checkpoint()
    assert isinstance(delayed, DelayedSubmission) and delayed.function is fold


def test_an_evaluation_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no $*, $MORE" >&2; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(slurm_module.sys, "executable", str(python))
    with pytest.raises(TrainingError, match=f"no .* report {tmp_path}, set"):
        Evaluation(tmp_path, {"MORE": "set"})()
