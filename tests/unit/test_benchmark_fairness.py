"""Fairness: each finding and each refusal, provoked in a small folder of results."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from masksam_nnunet.benchmarks.fairness import check_fairness, check_postprocessing
from masksam_nnunet.benchmarks.fold_record import FoldRecord, Inputs
from masksam_nnunet.benchmarks.results import Finding, Method, Row
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import BenchmarkError
from masksam_nnunet.inference.scoring import CaseScore, ClassScore, aggregate
from masksam_nnunet.plans.architecture import NETWORK_CLASS

DATASET = "Dataset007_Fake"
NNUNET = Method("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
OTHER = Method("nnUNetTrainerOther", "nnUNetPlans", "3d_fullres")
MASKSAM = Method("MaskSAMTrainer", "MaskSAMPlans", "3d_fullres")
BUDGETS = tuple(Method(f"{name}_budget", "nnUNetPlans", "3d_fullres") for name in ("nnUNetTrainer", "Mine"))
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [8, 16, 16],
    "spacing": [3.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {}},
}


class Grid:
    """A fake dataset of ten cases with five folds, and fake trained folds."""

    def __init__(self, root: Path, cases: list[str] | None = None) -> None:
        self.results, self.preprocessed = root / "results" / DATASET, root / "preprocessed" / DATASET
        self.cases = cases or [f"fake_{i:02d}" for i in range(10)]
        self.description = {
            "labels": {"background": 0, "a": 1},
            "channel_names": {"0": "MRI"},
            "file_ending": ".nii.gz",
        }
        self.splits: list[dict[str, list[str]]] = []
        for fold in range(5):
            val = self.cases[fold::5]
            self.splits.append({"train": [c for c in self.cases if c not in val], "val": val})
        truths = self.preprocessed / "gt_segmentations"
        truths.mkdir(parents=True)
        for case in self.cases:
            (truths / f"{case}.nii.gz").write_bytes(b"truth")
        self.write(self.preprocessed / "dataset.json", self.description)
        self.write(self.preprocessed / "splits_final.json", self.splits)

    def write(self, file: Path, content: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    def change(self, file: Path, change: Callable[[Any], object]) -> None:
        content = json.loads(file.read_text())
        change(content)
        self.write(file, content)

    def model(self, method: Method) -> Path:
        return self.results / method.key

    def fold(self, method: Method, fold: int) -> Path:
        return self.model(method) / f"fold_{fold}"

    def train(self, *methods: Method, seconds: float = 3600.0, device: str = "GPU A", backbone: str = "vit_b") -> None:
        """All folds of methods, as the benchmark leaves them."""
        for method in methods:
            plans = self.plans(method, backbone)
            self.write(self.preprocessed / f"{method.plans}.json", plans)
            self.write(self.model(method) / "plans.json", plans)
            self.write(self.model(method) / "dataset.json", self.description)
            for fold, split in enumerate(self.splits):
                folder = self.fold(method, fold)
                (folder / "validation").mkdir(parents=True)
                for case in split["val"]:
                    (folder / "validation" / f"{case}.nii.gz").write_bytes(b"prediction")
                scored = [{"prediction_file": f"/there/{case}.nii.gz"} for case in split["val"]]
                self.write(folder / "validation" / "summary.json", {"metric_per_case": scored})
                self.checkpoint(method, fold, seconds)
                (folder / "training_log_2024.txt").write_text("SAM's weights loaded\n")
                process = {
                    "device": device,
                    "iterations_per_epoch": 250,
                    "peak_memory_mib": 1.0,
                    "peak_memory_of": "GPU allocations",
                    "parameters": 2,
                    "trainable_parameters": 1,
                }
                FoldRecord(
                    folder,
                    method.trainer,
                    method.plans,
                    method.configuration,
                    None,
                    Inputs.read(self.preprocessed, method.plans),
                    git_hash="abc",
                    versions={"torch": "2.8.0", "nnunetv2": "2.8.1"},
                    parts=[{"kind": "train", "process": process}],
                ).write()

    def plans(self, method: Method, backbone: str) -> dict[str, Any]:
        configuration: dict[str, Any] = dict(CONFIGURATION)
        if method.trainer.startswith("MaskSAM"):
            config = MaskSAMConfig(backbone, (8, 16, 16), upsample=4, num_queries=8).to_json()
            configuration["architecture"] = {"network_class_name": NETWORK_CLASS, "arch_kwargs": {"config": config}}
        return {
            "plans_name": method.plans,
            "dataset_name": DATASET,
            "transpose_forward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
            "configurations": {"3d_fullres": configuration},
        }

    def checkpoint(self, method: Method, fold: int, seconds: float, epochs: int = 10) -> None:
        ends = [seconds * (i + 1) / epochs for i in range(epochs)]
        log = {"epoch_start_timestamps": [0.0, *ends[:-1]], "epoch_end_timestamps": ends}
        self.save({"network_weights": {}, "logging": log}, method, fold)

    def save(self, content: dict[str, Any], method: Method, fold: int) -> None:
        """A checkpoint older than the predictions, if there are any."""
        file = self.fold(method, fold) / "checkpoint_final.pth"
        torch.save(content, file)
        os.utime(file, (1, 1))

    def check(self, *methods: Method, folds: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[Finding, ...]:
        return check_fairness(methods, folds, self.results, self.preprocessed)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path)


def severe(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.text for finding in findings if finding.severe]


def stated(findings: tuple[Finding, ...], pattern: str) -> bool:
    return any(re.search(pattern, finding.text) for finding in findings if not finding.severe)


def test_a_fair_comparison(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    findings = grid.check(NNUNET, OTHER)
    assert [finding.text for finding in findings] == [
        "All methods were trained on the same preprocessed data, nnUNetPlans_3d_fullres.",
        "Length of the training of a fold: nnUNetTrainer: 10 epochs, 2,500 iterations; nnUNetTrainerOther: 10 epochs, "
        "2,500 iterations.",
    ]
    assert not severe(findings)


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [(5,), (-1,), (0, 7)])
def test_a_fold_that_is_not_there(grid: Grid, folds: tuple[int, ...]) -> None:
    grid.train(NNUNET)
    with pytest.raises(
        BenchmarkError, match=r"--folds (5|-1|7): splits_final.json has 5 folds, 0 to 4; .* random split"
    ):
        grid.check(NNUNET, folds=folds)


def test_splits_that_cannot_be_used(grid: Grid) -> None:
    grid.train(NNUNET)
    file = grid.preprocessed / "splits_final.json"
    with pytest.raises(BenchmarkError, match="--folds 0 0: name each fold once"):
        grid.check(NNUNET, folds=(0, 0))
    file.write_text("{}")
    with pytest.raises(BenchmarkError, match="not a list of folds"):
        grid.check(NNUNET)
    file.write_text("[{")
    with pytest.raises(BenchmarkError, match=r"splits_final\.json is not JSON"):
        grid.check(NNUNET)
    file.unlink()
    with pytest.raises(BenchmarkError, match=r"splits_final\.json cannot be read .*masksam split"):
        grid.check(NNUNET)


def test_validation_sets_must_be_disjoint_and_known(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.splits[1]["val"].append("fake_00")
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    with pytest.raises(BenchmarkError, match="validates cases more than once: fake_00"):
        grid.check(NNUNET)
    grid.splits[1]["val"][-1] = "stranger"
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    with pytest.raises(BenchmarkError, match=r"fold 1 .* no true label map in gt_segmentations: stranger"):
        grid.check(NNUNET)
    grid.splits[1]["val"] = []
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    with pytest.raises(BenchmarkError, match=r"--folds 1: .*no validation cases"):
        grid.check(NNUNET)


def test_folds_must_cover_every_case(grid: Grid) -> None:
    grid.splits[4]["val"] = grid.splits[4]["val"][:1]
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    grid.train(NNUNET)
    assert severe(grid.check(NNUNET)) == ["No fold of splits_final.json validates these training cases: fake_09."]
    some = grid.check(NNUNET, folds=(0, 2))
    assert not severe(some) and stated(some, "Only folds 0, 2 of 5 were compared: 4 of 10 cases")


def test_another_number_of_folds(grid: Grid) -> None:
    grid.splits = [
        {"train": grid.cases[5:], "val": grid.cases[:5]},
        {"train": grid.cases[:5], "val": grid.cases[5:]},
    ]
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    grid.train(NNUNET)
    findings = grid.check(NNUNET, folds=(0, 1))
    assert not severe(findings) and stated(findings, "2 folds, not 5")


def test_training_cases_are_not_validated(grid: Grid) -> None:
    grid.splits[2]["train"].append("fake_02")
    grid.write(grid.preprocessed / "splits_final.json", grid.splits)
    grid.train(NNUNET)
    assert severe(grid.check(NNUNET)) == ["Fold 2 validates cases that it was trained on: fake_02."]


def test_patients_are_kept_together(tmp_path: Path) -> None:
    cases = [f"patient{i:03d}_{frame}" for i in range(5) for frame in ("ED", "ES")]
    grid = Grid(tmp_path, cases)
    grid.train(NNUNET)
    (text,) = severe(grid.check(NNUNET))
    assert text.startswith("Patients are not kept together: ") and "in fold 0" in text and "masksam split -d 7" in text


# ---- folds -----------------------------------------------------------------------------------------------------------


def test_folds_that_are_not_trained_or_validated(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    (grid.fold(OTHER, 1) / "checkpoint_final.pth").unlink()
    (grid.fold(NNUNET, 2) / "validation" / "fake_02.nii.gz").unlink()
    (grid.fold(NNUNET, 3) / "validation" / "summary.json").unlink()
    with pytest.raises(BenchmarkError) as caught:
        grid.check(NNUNET, OTHER)
    message = str(caught.value)
    assert "nnUNetTrainerOther, fold 1 is not trained to its end" in message
    assert "nnUNetTrainer, fold 2 lacks predictions of its validation cases fake_02" in message
    assert "nnUNetTrainer, fold 3 is not validated" in message
    assert "Run masksam benchmark" in message
    grid.check(NNUNET, OTHER, folds=(0, 4))


def test_predictions_for_other_cases(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    validation = grid.fold(OTHER, 0) / "validation"
    (validation / "fake_01.nii.gz").write_bytes(b"prediction")
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert "nnUNetTrainerOther, fold 0" in text and "other splits: fake_01" in text
    (validation / "fake_00.nii.gz").unlink()
    with pytest.raises(BenchmarkError, match="cases fake_00; it has predictions of other cases: fake_01"):
        grid.check(NNUNET, OTHER)


def test_a_truncated_checkpoint(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    file = grid.fold(OTHER, 3) / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-50])
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert text.startswith("The checkpoint of nnUNetTrainerOther, fold 3, is damaged")


def test_a_checkpoint_without_a_log(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    grid.save({}, OTHER, 3)
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert text.startswith("The checkpoint of nnUNetTrainerOther, fold 3, is damaged")


# ---- data ------------------------------------------------------------------------------------------------------------


def test_other_data_are_stated(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)

    def change(plans: Any) -> None:
        plans["configurations"]["3d_fullres"] |= {
            "data_identifier": "Mine_3d_fullres",
            "spacing": [2.0, 1.0, 1.0],
            "batch_size": 4,
        }

    grid.change(grid.model(OTHER) / "plans.json", change)
    findings = grid.check(NNUNET, OTHER)
    assert not severe(findings)
    assert stated(
        findings, r"differ in spacing: nnUNetTrainer: \[3.0, 1.0, 1.0\]; nnUNetTrainerOther: \[2.0, 1.0, 1.0\]"
    )
    assert stated(findings, "differ in batch_size: nnUNetTrainer: 2; nnUNetTrainerOther: 4")
    assert not stated(findings, "patch_size") and not stated(findings, "same preprocessed data")


def test_the_same_data_in_two_folders(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    grid.change(
        grid.model(OTHER) / "plans.json",
        lambda plans: plans["configurations"]["3d_fullres"].update(data_identifier="Mine_3d_fullres"),
    )
    assert stated(grid.check(NNUNET, OTHER), "data of their own, made with the same spacing.*Mine_3d_fullres")


def test_plans_that_disagree_on_one_folder(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    grid.change(grid.model(OTHER) / "plans.json", lambda plans: plans.update(transpose_forward=[1, 0, 2]))
    findings = grid.check(NNUNET, OTHER)
    assert len(severe(findings)) == 1 and "nnUNetPlans_3d_fullres, but their plans disagree" in severe(findings)[0]
    assert findings[0].severe and stated(findings, "differ in transpose_forward")


def test_another_dataset_json(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    grid.change(grid.model(OTHER) / "dataset.json", lambda content: content.update(labels={"background": 0, "b": 1}))
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert "nnUNetTrainerOther was trained with another dataset.json" in text and "'b': 1" in text and "'a': 1" in text


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_model_without_its_files(grid: Grid, name: str) -> None:
    grid.train(NNUNET)
    (grid.model(NNUNET) / name).unlink()
    with pytest.raises(BenchmarkError, match=rf"{NNUNET.key}/{name} cannot be read .* put it back"):
        grid.check(NNUNET)


def test_plans_without_the_configuration(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.change(grid.model(NNUNET) / "plans.json", lambda plans: plans.update(configurations={}))
    with pytest.raises(BenchmarkError, match="no usable configuration '3d_fullres'"):
        grid.check(NNUNET)


# ---- training --------------------------------------------------------------------------------------------------------


def test_folds_trained_elsewhere(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    for fold in (1, 3):
        (grid.fold(OTHER, fold) / "benchmark_run.json").unlink()
    findings = grid.check(NNUNET, OTHER)
    assert not severe(findings) and stated(findings, "outside this benchmark: nnUNetTrainerOther, folds 1, 3;")


@pytest.mark.parametrize(("name", "key"), [("splits_final.json", "splits_sha256"), ("dataset.json", "dataset_sha256")])
def test_inputs_that_changed_since(grid: Grid, name: str, key: str) -> None:
    grid.train(NNUNET, OTHER)
    grid.change(grid.fold(OTHER, 2) / "benchmark_run.json", lambda record: record.update({key: "0" * 64}))
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert (
        text == f"{name} in nnUNet_preprocessed has changed since these folds were trained: nnUNetTrainerOther, fold 2."
    )


def test_plans_that_changed_between_folds_or_since(grid: Grid) -> None:
    grid.train(NNUNET, OTHER)
    grid.change(grid.fold(OTHER, 2) / "benchmark_run.json", lambda record: record.update(plans_sha256="0" * 64))
    (text,) = severe(grid.check(NNUNET, OTHER))
    assert "folds of nnUNetTrainerOther were trained with different plans" in text and "fold 2: 00000000" in text
    for fold in range(5):
        grid.change(grid.fold(OTHER, fold) / "benchmark_run.json", lambda record: record.update(plans_sha256="0" * 64))
    findings = grid.check(NNUNET, OTHER)
    assert not severe(findings) and stated(
        findings, r"nnUNetPlans\.json .* not the file any more that nnUNetTrainerOther"
    )


def test_training_times(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.train(OTHER, seconds=3800.0)
    assert not stated(grid.check(NNUNET, OTHER), "different times")
    for fold in range(5):
        grid.checkpoint(OTHER, fold, 7200.0, epochs=20)
    findings = grid.check(NNUNET, OTHER)
    assert not severe(findings)
    assert stated(findings, r"different times.*nnUNetTrainer: 5\.0 h; nnUNetTrainerOther: 10\.0 h")
    assert stated(findings, "nnUNetTrainerOther: 20 epochs, 5,000 iterations")


def test_time_budgets_must_be_the_same(grid: Grid) -> None:
    grid.train(*BUDGETS, seconds=600.0)
    assert not severe(grid.check(*BUDGETS))
    grid.checkpoint(BUDGETS[1], 4, 700.0)
    (text,) = severe(grid.check(*BUDGETS))
    assert "not given the same" in text and "Mine_budget: 10.0 min to 11.7 min" in text


def test_other_machines_and_software_are_stated(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.train(OTHER, device="GPU B")

    def change(record: Any) -> None:
        record["versions"]["torch"] = "2.10.0"
        record["git_hash"] = "def"

    grid.change(grid.fold(NNUNET, 0) / "benchmark_run.json", change)
    findings = grid.check(NNUNET, OTHER)
    assert not severe(findings)
    assert stated(findings, r"GPU A \(nnUNetTrainer, folds 0, 1, 2, 3, 4\); GPU B \(nnUNetTrainerOther, folds")
    assert stated(findings, r"versions of torch: 2\.10\.0 \(nnUNetTrainer, fold 0\); 2\.8\.0 \(nnUNetTrainer, folds 1")
    assert stated(findings, r"commits of this package: def \(nnUNetTrainer, fold 0\)")
    assert not stated(findings, "versions of nnunetv2")


def test_a_record_that_is_not_readable(grid: Grid) -> None:
    grid.train(NNUNET)
    (grid.fold(NNUNET, 0) / "benchmark_run.json").write_text("{")
    with pytest.raises(BenchmarkError, match="not a benchmark's record"):
        grid.check(NNUNET)


def test_sams_weights_are_stated_and_random_ones_refused(grid: Grid) -> None:
    grid.train(NNUNET, MASKSAM)
    findings = grid.check(NNUNET, MASKSAM)
    assert not severe(findings) and stated(findings, r"MaskSAMTrainer \(MaskSAMPlans\) starts from SAM's vit_b weights")
    log = grid.fold(MASKSAM, 2) / "training_log_2025.txt"
    log.write_text("2025: WARNING: MASKSAM_RANDOM_INIT is set. SAM's part stays at RANDOM\n")
    (text,) = severe(grid.check(NNUNET, MASKSAM))
    assert "MASKSAM_RANDOM_INIT" in text and "MaskSAMTrainer (MaskSAMPlans), fold 2" in text
    log.unlink()
    (grid.fold(MASKSAM, 1) / "training_log_2024.txt").unlink()
    findings = grid.check(NNUNET, MASKSAM)
    assert not severe(findings) and stated(findings, r"not known for MaskSAMTrainer \(MaskSAMPlans\), fold 1")


def test_tiny_is_not_sam(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.train(MASKSAM, backbone="tiny")
    findings = grid.check(NNUNET, MASKSAM)
    assert not severe(findings) and stated(findings, "tiny encoder tiny of this project, which is not SAM")
    assert not stated(findings, "starts from SAM's")


def test_severe_findings_come_first(grid: Grid) -> None:
    grid.train(NNUNET)
    grid.train(OTHER, seconds=9000.0)
    (grid.fold(OTHER, 0) / "validation" / "fake_01.nii.gz").write_bytes(b"prediction")
    findings = grid.check(NNUNET, OTHER)
    order = [finding.severe for finding in findings]
    assert order == sorted(order, reverse=True) and order[0] and not order[-1]


def test_no_method_and_no_truths(grid: Grid) -> None:
    with pytest.raises(BenchmarkError, match="--trainers names no method"):
        grid.check()
    grid.train(NNUNET)
    for file in (grid.preprocessed / "gt_segmentations").iterdir():
        file.unlink()
    with pytest.raises(BenchmarkError, match="gt_segmentations holds no label maps"):
        grid.check(NNUNET)


def test_postprocessing_for_all_or_none() -> None:
    score = {"a": ClassScore(0.5, 1.0, 0.5, 1.0, 1.0)}
    scores = aggregate([CaseScore("c", score)], 1.0)

    def row(method: Method, kind: Any) -> Row:
        return Row(f"{method.trainer} {kind}", kind, (method,), scores, {"c": 0}, (), {}, Path("p"))

    raw = [row(NNUNET, "method"), row(OTHER, "method")]
    assert check_postprocessing(raw) == ()
    (finding,) = check_postprocessing([*raw, row(NNUNET, "postprocessed")])
    assert "tried for nnUNetTrainer method but not for nnUNetTrainerOther method" in finding.text
    assert check_postprocessing([*raw, row(NNUNET, "postprocessed"), row(OTHER, "postprocessed")]) == ()
