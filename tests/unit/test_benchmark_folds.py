"""How far a fold has come, judged by its folder; its record; what its training took; its progress."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from masksam_nnunet.benchmarks.folds import FoldRecord, Part, Stage, fold_state, locked, read_fold_compute
from masksam_nnunet.benchmarks.jobs import FoldJob, Status
from masksam_nnunet.benchmarks.progress import Progress, fold_progress
from masksam_nnunet.benchmarks.results import FoldCompute
from masksam_nnunet.errors import MaskSAMError, TrainingError
from masksam_nnunet.inference.methods import ModelName
from masksam_nnunet.inference.provenance import History

CASES = ["a", "b"]


def write_checkpoint(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 5000)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(bytes(content))


def write_validation(folder: Path, cases: list[str], endings: tuple[str, ...] = (".nii.gz", ".npz", ".pkl")) -> None:
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    zipped = io.BytesIO()
    np.savez(zipped, probabilities=np.zeros(9))
    contents = {".nii.gz": b"x", ".npz": zipped.getvalue(), ".pkl": b"x"}
    for case in cases:
        for ending in endings:
            (folder / "validation" / f"{case}{ending}").write_bytes(contents[ending])
    scored = [{"prediction_file": f"/elsewhere/{case}.nii.gz"} for case in cases]
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": scored}))


def stage(folder: Path, npz: bool = True) -> Stage:
    return fold_state(folder, CASES, ".nii.gz", npz).stage


def test_the_stages_of_a_fold(tmp_path: Path) -> None:
    fold = tmp_path / "fold_0"
    assert stage(fold) is Stage.MISSING
    write_checkpoint(fold / "checkpoint_best.pth")
    assert stage(fold) is Stage.BROKEN_OFF
    write_checkpoint(fold / "checkpoint_final.pth")
    assert stage(fold) is Stage.TRAINED
    write_validation(fold, CASES[:1])
    assert stage(fold) is Stage.TRAINED
    write_validation(fold, CASES[1:], (".nii.gz",))
    assert stage(fold) is Stage.TRAINED
    write_validation(fold, CASES)
    assert stage(fold) is Stage.DONE
    for name in ("b.npz", "summary.json"):  # cut short
        file = fold / "validation" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert stage(fold) is Stage.TRAINED
        file.write_bytes(whole)
    cut(fold / "checkpoint_final.pth")
    assert stage(fold) is Stage.DAMAGED


@pytest.mark.parametrize(("name", "spoil"), [("latest", cut), ("best", flip), ("final", flip)])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    file = tmp_path / f"checkpoint_{name}.pth"
    write_checkpoint(file)
    spoil(file)
    state = fold_state(tmp_path, CASES, ".nii.gz", npz=False)
    assert state.stage is Stage.DAMAGED and str(file) in state.reason


def test_the_remedy_names_the_checkpoint_to_continue_from(tmp_path: Path) -> None:
    for damaged, whole in (("final", "latest"), ("latest", "best")):
        write_checkpoint(tmp_path / f"checkpoint_{damaged}.pth")
        write_checkpoint(tmp_path / f"checkpoint_{whole}.pth")
        cut(tmp_path / f"checkpoint_{damaged}.pth")
        assert f"checkpoint_{whole}.pth" in fold_state(tmp_path, CASES, ".nii.gz", False).reason
        (tmp_path / f"checkpoint_{damaged}.pth").unlink()
        assert stage(tmp_path) is Stage.BROKEN_OFF


def write_log(folder: Path, day: str, *lines: str) -> None:
    """As nnU-Net's print_to_log_file, which ends lines with a space."""
    text = "".join(f"2026-11-23 21:01:40.680213: {line} \n" for line in lines)
    (folder / f"training_log_2026_{day}_21_01_30.txt").write_text(text)


def test_predictions_of_an_earlier_training_do_not_count_and_a_copy_of_a_done_fold_does(tmp_path: Path) -> None:
    write_validation(tmp_path, CASES)
    write_checkpoint(tmp_path / "checkpoint_final.pth")
    os.utime(tmp_path / "validation" / "summary.json", (1, 1))
    assert stage(tmp_path) is Stage.TRAINED  # older than the checkpoint, and no log
    write_log(tmp_path, "11_9", "Epoch 3", "Training done.", "predicting a", "Validation complete", "Mean Dice: 0.5")
    assert stage(tmp_path) is Stage.DONE
    write_log(tmp_path, "11_10", "Epoch 0", "Training done.", "predicting a")  # trained again, then killed
    os.utime(tmp_path / "validation" / "summary.json")
    assert stage(tmp_path) is Stage.TRAINED
    write_log(tmp_path, "11_11", "predicting a", "Validation complete")  # by --val
    assert stage(tmp_path) is Stage.DONE
    best = "Loaded /results/fold_0/checkpoint_best.pth: 3 epochs are done."
    write_log(tmp_path, "11_12", best, "predicting a", "Validation complete")  # by --val --val_best
    assert stage(tmp_path) is Stage.TRAINED
    write_log(tmp_path, "11_13", best, "Training done.", "predicting a", "Validation complete")  # continued from it
    assert stage(tmp_path) is Stage.DONE


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    with locked(tmp_path, ""), pytest.raises(TrainingError, match="reading"), locked(tmp_path, "reading", wait=0.1):
        pass
    with locked(tmp_path, "", wait=0.1):
        pass


# ---- what a training took --------------------------------------------------------------------------------------------


def write_final(fold: Path, epochs: int) -> None:
    """A checkpoint whose ten weights are listed under two names, as nnU-Net's networks do."""
    fold.mkdir(parents=True, exist_ok=True)
    log = {
        "epoch_start_timestamps": [100.0 * n for n in range(epochs)],
        "epoch_end_timestamps": [100.0 * n + 7 for n in range(epochs)],
        **dict.fromkeys(("train_losses", "val_losses", "mean_fg_dice"), [0.5] * epochs),
    }
    weights = torch.zeros(2, 5)
    named = {"conv.weight": weights, "all.0.weight": weights, "bias": torch.zeros(3)}
    torch.save({"network_weights": named, "logging": log}, fold / "checkpoint_final.pth")


def part(kind: str, **values: object) -> Part:
    return Part.model_validate({"kind": kind, "command": "nnUNetv2_train", "variables": {}} | values)


def compute_of(folder: Path) -> FoldCompute:
    return read_fold_compute(folder, History.read(folder / "checkpoint_final.pth"))


def test_compute_is_put_together_from_log_record_and_debug_file(tmp_path: Path) -> None:
    fold = tmp_path / "fold_3"
    write_final(fold, epochs=4)
    (fold / "debug.json").write_text('{"num_iterations_per_epoch": "250", "device": "cuda:0"}')
    one, other = ({"git_hash": name, "versions": {"torch": version}} for name, version in (("a", "2.8"), ("b", "2.9")))
    parts = [
        part("train", device="P100", peak_memory_mib=9000.0, train_seconds=1.0),  # given up before a new start
        part("train", device="V100", peak_memory_mib=700.0, train_seconds=40.0, **one),
        part("continue", device="A100", peak_memory_mib=5.0, train_seconds=20.0, **other),
        part("validate", peak_memory_mib=9000.0),
    ]
    record = FoldRecord(trainer="T", plans="P", configuration="2d", minutes=None, inputs={}, parts=parts)
    record.write(fold)
    assert FoldRecord.read(fold) == record
    compute = compute_of(fold)
    assert (compute.fold, compute.seconds, compute.epochs, compute.iterations) == (3, 28.0, 4, 1000)
    assert (compute.peak_memory_mib, compute.resumed, compute.device) == (700.0, 1, "V100 and A100")
    assert (compute.git_hash, compute.wall_seconds, compute.versions) == ("a then b", 60.0, {"torch": "2.8 then 2.9"})
    assert (compute.parameters, compute.trainable_parameters) == (13, None)
    assert compute.checkpoint_bytes == (fold / "checkpoint_final.pth").stat().st_size


def test_a_fold_trained_elsewhere_has_what_its_log_says(tmp_path: Path) -> None:
    write_final(tmp_path / "fold_0", epochs=2)
    compute = compute_of(tmp_path / "fold_0")
    assert (compute.seconds, compute.epochs, compute.parameters) == (14.0, 2, 13)
    assert compute.peak_memory_mib is compute.iterations is compute.git_hash is compute.wall_seconds is None
    with pytest.raises(MaskSAMError, match="fold_1"):
        compute_of(tmp_path / "fold_1")
    (tmp_path / "fold_0" / "training_stats.json").write_text('{"train_seconds": 180.5, "iterations": 77}')
    compute = compute_of(tmp_path / "fold_0")  # a trainer's own figures count
    assert (compute.seconds, compute.iterations) == (180.5, 77)
    (tmp_path / "fold_0" / "benchmark_run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"benchmark_run\.json"):
        compute_of(tmp_path / "fold_0")
    torch.save({"network_weights": {}}, tmp_path / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(MaskSAMError, match="checkpoint_final"):
        compute_of(tmp_path / "fold_0")


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> FoldJob:
    environment = {"nnUNet_results": str(tmp_path / "results"), "nnUNet_preprocessed": str(tmp_path)}
    job = FoldJob("D", ModelName("T", "P", "2d"), 0, "cpu", environment)
    job.folder.mkdir(parents=True)
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "splits_final.json").write_text('[{"train": ["a"], "val": ["b", "c"]}]')
    return job


def test_how_far_a_fold_is(job: FoldJob) -> None:
    assert fold_progress(job) == (0.0, "starting")
    job.log.write_text("2024: Epoch 0 \nx\n2024: Epoch 4 \nEpoch time: 3 s\n")
    assert fold_progress(job)[1] == "epoch 5"
    (job.folder / "debug.json").write_text('{"num_epochs": "8"}')
    assert fold_progress(job) == (pytest.approx(0.95 / 2), "epoch 5 of 8")
    (job.folder / "budget_progress.json").write_text('{"fraction": 0.1, "iterations": 12}')
    assert fold_progress(job)[1] == "12 iterations"
    (job.folder / "checkpoint_final.pth").touch()
    (job.folder / "validation").mkdir()
    for name in ("b.nii.gz", "b.npz", "b.pkl"):
        (job.folder / "validation" / name).touch()
    assert fold_progress(job)[1] == "validation, 1 of 2 cases"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(job: FoldJob, terminal: bool) -> None:
    out = io.StringIO()
    statuses: tuple[Status, ...] = ("waiting", "running", "running", "done")
    with Progress(Console(file=out, force_terminal=terminal, width=150), [job]) as progress:
        for status in statuses:
            progress.show({job.name: status})
    told = out.getvalue()
    assert told.count(f"{job.name}: running") == 1 and f"{job.name}: done (1 of 1" in told
    assert ("all folds" in told) is terminal
