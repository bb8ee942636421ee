"""`masksam benchmark` on the SLURM that is up, with jobs broken off in three ways; called by run.sh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from nnunet_workspace import SHARED, Workspace, copy_small

from masksam_nnunet.benchmarks.folds import FoldRecord, read_fold_compute
from masksam_nnunet.inference.phantoms import write_phantom_dataset
from masksam_nnunet.inference.provenance import History

CASES, EPOCHS = 10, 6
DATASET = "Dataset004_Small"
TRAINERS = ("ShortNNUNet", "ShortMaskSAM")
FOLDS = [(trainer, fold) for trainer in TRAINERS for fold in (0, 1)]


def prepare(root: Path) -> Workspace:
    workspace = Workspace(root)
    source = SHARED / "Dataset004_Hippocampus"
    if not source.is_dir():
        source = write_phantom_dataset(root / "phantoms", num_cases=CASES)
    copy_small(source, workspace.raw / DATASET, CASES)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 1)
    workspace.set_batch_size(DATASET, 2)
    # Threads that wait must not keep jobs beside them from working.
    workspace.extra |= {"TEST_EPOCHS": str(EPOCHS), "TEST_MIRRORING": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    return workspace


def queued() -> dict[str, str]:
    """Numbers of SLURM's jobs by their names."""
    text = subprocess.run(["squeue", "--noheader", "--format=%j %i"], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in text.splitlines())


def trainings(trainer: str, fold: int) -> list[psutil.Process]:
    words = f"nnUNetv2_train {DATASET} 3d_fullres {fold} -tr {trainer}"
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if words in " ".join(process.info["cmdline"] or [])]


def preempt(number: str, processes: list[psutil.Process]) -> None:
    """As SLURM before it pre-empts, or at the end of the time."""
    subprocess.run(["scancel", "--signal=USR2", number], check=True)


def requeue(number: str, processes: list[psutil.Process]) -> None:
    """As SLURM when a node fails."""
    subprocess.run(["scontrol", "requeue", number], check=True)


def kill(number: str, processes: list[psutil.Process]) -> None:
    """As the system when memory is short."""
    for process in processes:
        process.send_signal(signal.SIGKILL)


def main(root: Path) -> None:
    workspace, out = prepare(root), root / "benchmark"
    command = ["benchmark", "-d", "4", "--trainers", *TRAINERS, "--folds", "0", "1", "-device", "cpu"]
    command += ["--out", str(out), "-np", "1", "--executor", "slurm", "--cpus", "1", "--hours", "0.5"]

    def masksam(*more: str, fails: bool = False) -> str:
        words = [str(Path(sys.executable).with_name("masksam")), *command, *more]
        done = subprocess.run(words, env=workspace.environment, text=True, capture_output=True)
        print(done.stdout, done.stderr, flush=True)
        assert bool(done.returncode) == fails, done.returncode
        return done.stdout + done.stderr

    assert "nowhere" in masksam("--partition", "nowhere", "--out", str(root / "refused"), fails=True)
    assert "submitted 4 jobs" in masksam("--partition", "main")
    assert "submitted 4 jobs" not in masksam("--partition", "main")  # all are queued
    ways: dict[tuple[str, int], Callable[[str, list[psutil.Process]], None]]
    ways = dict(zip(FOLDS, (preempt, requeue, kill), strict=False))
    broken_off: list[tuple[str, int]] = []
    while jobs := queued():
        for trainer, fold in [*ways]:
            folder = workspace.model(DATASET, trainer) / f"fold_{fold}"
            running = trainings(trainer, fold)
            if running and (folder / "checkpoint_best.pth").exists():
                (number,) = (n for name, n in jobs.items() if trainer in name and name.endswith(f"fold_{fold}"))
                way = ways.pop((trainer, fold))
                way(number, running)
                broken_off.append((trainer, fold))
                print(f"[{time.strftime('%H:%M:%S')}] {trainer}, fold {fold}: {way.__name__}", flush=True)
        time.sleep(0.5)
    assert not ways and not (out / "report.html").exists()
    assert not any(trainings(*one) for one in FOLDS), "training processes are left"
    told = masksam("--partition", "main", "--wait")  # the killed one is still to be done
    assert "submitted 1 jobs" in told and str(out / "report.html") in told and (out / "report.html").is_file()
    for trainer, fold in FOLDS:
        folder = workspace.model(DATASET, trainer) / f"fold_{fold}"
        log = History.read(folder / "checkpoint_final.pth")
        record, compute = FoldRecord.read(folder), read_fold_compute(folder, log)
        assert record is not None
        assert [part.kind for part in record.parts] == ["train", *["continue"] * ((trainer, fold) in broken_off)]
        assert (compute.epochs, compute.iterations) == (EPOCHS, 2 * EPOCHS)
    print("complete: 4 folds, 3 of them broken off and continued")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]).absolute())
