"""Fairness: each finding and each refusal, provoked in a small folder of results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from masksam_nnunet.benchmarks.checks import check_fairness, check_splits, faulty_prediction, refuse_unfair
from masksam_nnunet.benchmarks.folds import FoldRecord, input_hashes
from masksam_nnunet.benchmarks.results import Finding
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import DataError, MaskSAMError, TrainingError
from masksam_nnunet.inference.methods import Method
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
    "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {}},
}


class Results:
    """A fake dataset of ten cases with five folds, and fake trained folds."""

    def __init__(self, root: Path) -> None:
        self.results, self.preprocessed = root / "results" / DATASET, root / "preprocessed" / DATASET
        self.cases = [f"fake_{i:02d}" for i in range(10)]
        self.description = {
            "labels": {"background": 0, "a": 1},
            "channel_names": {"0": "MRI"},
            "file_ending": ".nii.gz",
        }
        truths = self.preprocessed / "gt_segmentations"
        truths.mkdir(parents=True)
        for case in self.cases:
            (truths / f"{case}.nii.gz").write_bytes(b"truth")
        self.splits = [
            {"train": [c for c in self.cases if c not in self.cases[fold::5]], "val": self.cases[fold::5]}
            for fold in range(5)
        ]
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

    def train(self, *methods: Method, backbone: str = "vit_b") -> None:
        """All folds of methods, as the benchmark leaves them."""
        for method in methods:
            plans = self.plans(method, backbone)
            self.write(self.preprocessed / f"{method.plans}.json", plans)
            self.write(self.model(method) / "plans.json", plans)
            self.write(self.model(method) / "dataset.json", self.description)
            inputs = input_hashes(self.preprocessed, method.plans)
            for fold, split in enumerate(self.splits):
                folder = self.fold(method, fold)
                scored = [{"prediction_file": f"/there/{case}.nii.gz"} for case in split["val"]]
                self.write(folder / "validation" / "summary.json", {"metric_per_case": scored})
                for case in split["val"]:
                    (folder / "validation" / f"{case}.nii.gz").write_bytes(b"prediction")
                self.checkpoint(method, fold)
                (folder / "training_log_2024.txt").write_text("SAM's weights loaded\n")
                FoldRecord(
                    trainer=method.trainer, plans=method.plans, configuration="3d_fullres", minutes=None, inputs=inputs
                ).write(folder)

    def plans(self, method: Method, backbone: str) -> dict[str, Any]:
        configuration: dict[str, Any] = dict(CONFIGURATION)
        if method.trainer.startswith("MaskSAM"):
            config = MaskSAMConfig(backbone, (8, 16, 16), upsample=4, num_queries=8).to_json()
            configuration["architecture"] = {"network_class_name": NETWORK_CLASS, "arch_kwargs": {"config": config}}
        return {
            "plans_name": method.plans,
            "dataset_name": DATASET,
            "transpose_forward": [0, 1, 2],
            "configurations": {"3d_fullres": configuration},
        }

    def checkpoint(self, method: Method, fold: int, seconds: float = 600.0, log: dict[str, Any] | None = None) -> None:
        """A checkpoint older than the predictions."""
        log = {"epoch_start_timestamps": [0.0], "epoch_end_timestamps": [seconds]} if log is None else log
        file = self.fold(method, fold) / "checkpoint_final.pth"
        torch.save({"network_weights": {}, "logging": log}, file)
        os.utime(file, (1, 1))

    def check(self, *methods: Method, folds: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[Finding, ...]:
        return check_fairness(methods, folds, self.results, self.preprocessed)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path)


def severe(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.text for finding in findings if finding.severe]


def stated(findings: tuple[Finding, ...], *words: str) -> bool:
    return any(all(word in finding.text for word in words) for finding in findings if not finding.severe)


def test_a_fair_comparison(results: Results) -> None:
    results.train(NNUNET, OTHER)
    findings = results.check(NNUNET, OTHER)
    assert not severe(findings) and stated(findings, "nnUNetPlans_3d_fullres")
    refuse_unfair(severe(findings), False, "unfair")
    refuse_unfair(["a reason"], True, "unfair")
    with pytest.raises(DataError, match="a reason"):
        refuse_unfair(["a reason"], False, "unfair")


# ---- splits ----------------------------------------------------------------------------------------------------------


def splits(*folds: tuple[str, str]) -> list[dict[str, list[str]]]:
    return [{"train": train.split(), "val": val.split()} for train, val in folds]


SOUND = splits(("a b", "c"), ("a c", "b"), ("b c", "a"))


@pytest.mark.parametrize(
    ("given", "folds", "named"),
    [
        (SOUND, (3,), "--folds 3"),
        (SOUND, (0, 0), "--folds 0, 0"),
        (SOUND, (), "--folds"),
        (splits(("a", "")), (0,), "--folds 0"),
        (splits(("a", "b"), ("a", "b")), (0, 1), "b"),
    ],
)
def test_splits_that_cannot_be_compared(given: Any, folds: tuple[int, ...], named: str) -> None:
    with pytest.raises(MaskSAMError, match=named):
        check_splits(given, folds, ["a", "b", "c"], DATASET)


def test_splits_that_are_no_fair_cross_validation() -> None:
    cases = ["a", "b", "c"]
    assert check_splits(SOUND, (0, 1, 2), cases, DATASET) == []
    (part,) = check_splits(SOUND, (0, 2), cases, DATASET)
    assert not part.severe and "2 of 3 cases" in part.text
    (left_out,) = check_splits(SOUND[:2], (0, 1), cases, DATASET)
    assert left_out.severe and left_out.text.endswith(": a.")
    (both,) = check_splits(splits(("a b c", "c"), ("c", "a b")), (0, 1), cases, DATASET)
    assert both.severe and "Fold 0" in both.text and both.text.endswith(": c.")


def test_patients_are_kept_together() -> None:
    by_name = splits(("p1_a p2_a", "p1_b p2_b"), ("p1_b p2_b", "p1_a p2_a"))
    (finding,) = check_splits(by_name, (0, 1), ["p1_a", "p1_b", "p2_a", "p2_b"], DATASET)
    assert finding.severe and "masksam split -d 7" in finding.text
    patients = {"a": "anne", "b": "anne", "c": "carl"}
    found = check_splits(SOUND, (0, 1, 2), ["a", "b", "c"], DATASET, patients)
    assert [finding.text.split()[1] for finding in found] == ["1", "2"] and all("anne" in f.text for f in found)


# ---- folds -----------------------------------------------------------------------------------------------------------


def test_folds_that_are_not_trained_or_validated_are_refused(results: Results) -> None:
    results.train(NNUNET, OTHER)
    (results.fold(OTHER, 1) / "checkpoint_final.pth").unlink()
    (results.fold(NNUNET, 2) / "validation" / "fake_02.nii.gz").unlink()
    (results.fold(NNUNET, 3) / "validation" / "summary.json").unlink()
    with pytest.raises(TrainingError) as caught:
        results.check(NNUNET, OTHER)
    for named in ("nnUNetTrainerOther, fold 1", "nnUNetTrainer, fold 2", "fake_02", "nnUNetTrainer, fold 3"):
        assert named in str(caught.value)
    results.check(NNUNET, OTHER, folds=(0, 4))


def test_predictions_of_other_cases(results: Results) -> None:
    results.train(NNUNET, OTHER)
    (results.fold(OTHER, 0) / "validation" / "fake_01.nii.gz").write_bytes(b"prediction")
    findings = results.check(NNUNET, OTHER)
    (text,) = severe(findings)
    assert "nnUNetTrainerOther, fold 0" in text and "fake_01" in text and findings[0].severe


def test_damaged_checkpoints(results: Results) -> None:
    results.train(NNUNET, OTHER)
    file = results.fold(OTHER, 3) / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-50])
    results.checkpoint(NNUNET, 1, log={})
    texts = severe(results.check(NNUNET, OTHER))
    assert len(texts) == 2 and "nnUNetTrainer, fold 1" in texts[0] and "nnUNetTrainerOther, fold 3" in texts[1]


def test_time_budgets_must_be_the_same(results: Results) -> None:
    results.train(*BUDGETS)
    assert not severe(results.check(*BUDGETS))
    results.checkpoint(BUDGETS[1], 4, 700.0)
    (text,) = severe(results.check(*BUDGETS))
    assert "Mine_budget, fold 4: 700 s" in text


# ---- data and weights ------------------------------------------------------------------------------------------------


def change_configuration(results: Results, **values: object) -> None:
    results.change(
        results.model(OTHER) / "plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(values)
    )


def test_other_data_are_stated_and_a_contradiction_is_severe(results: Results) -> None:
    results.train(NNUNET, OTHER)
    change_configuration(results, data_identifier="Mine", spacing=[2.0, 1.0, 1.0], batch_size=4)
    findings = results.check(NNUNET, OTHER)
    assert not severe(findings)
    assert stated(findings, "spacing", "nnUNetTrainer: [3.0, 1.0, 1.0]", "nnUNetTrainerOther: [2.0, 1.0, 1.0]")
    assert stated(findings, "batch_size") and not stated(findings, "patch_size")
    change_configuration(results, data_identifier="nnUNetPlans_3d_fullres")
    (text,) = severe(results.check(NNUNET, OTHER))
    assert "nnUNetPlans_3d_fullres" in text


def test_another_dataset_json(results: Results) -> None:
    results.train(NNUNET, OTHER)
    file = results.model(OTHER) / "dataset.json"
    results.change(file, lambda content: content.update(labels={"background": 0, "b": 1}))
    (text,) = severe(results.check(NNUNET, OTHER))
    assert "nnUNetTrainerOther" in text and "'b': 1" in text and "'a': 1" in text


def test_missing_files_are_named(results: Results) -> None:
    results.train(NNUNET)
    for file in (results.model(NNUNET) / "dataset.json", results.model(NNUNET) / "plans.json"):
        file.unlink()
        with pytest.raises(DataError, match=file.name):
            results.check(NNUNET)


@pytest.mark.parametrize("name", ["splits_final.json", "dataset.json", "nnUNetPlans.json"])
def test_inputs_that_changed_since_the_training(results: Results, name: str) -> None:
    results.train(NNUNET, OTHER)
    (results.fold(OTHER, 1) / "benchmark_run.json").unlink()  # as if trained elsewhere
    file = results.fold(OTHER, 2) / "benchmark_run.json"
    results.change(file, lambda record: record["inputs"].update({name: "0" * 64}))
    findings = results.check(NNUNET, OTHER)
    (text,) = severe(findings)
    assert name in text and text.endswith(": nnUNetTrainerOther, fold 2.")
    assert stated(findings, "nnUNetTrainerOther, fold 1")


def test_random_weights_in_place_of_sams_are_severe(results: Results) -> None:
    results.train(NNUNET, MASKSAM)
    findings = results.check(NNUNET, MASKSAM)
    assert not severe(findings) and stated(findings, "MaskSAMTrainer (MaskSAMPlans)", "vit_b")
    (results.fold(MASKSAM, 1) / "training_log_2024.txt").unlink()
    assert stated(results.check(NNUNET, MASKSAM), "MaskSAMTrainer (MaskSAMPlans), fold 1")
    (results.fold(MASKSAM, 2) / "training_log_2025.txt").write_text("WARNING: MASKSAM_RANDOM_INIT is set.\n")
    (text,) = severe(results.check(NNUNET, MASKSAM))
    assert "MASKSAM_RANDOM_INIT" in text and "MaskSAMTrainer (MaskSAMPlans), fold 2" in text


def test_tiny_is_not_sam(results: Results) -> None:
    results.train(MASKSAM, backbone="tiny")
    findings = results.check(MASKSAM)
    assert not severe(findings) and stated(findings, "tiny", "not SAM")


# ---- predictions that nnU-Net's functions stumble over ---------------------------------------------------------------

LABELS = np.zeros((4, 5, 6), np.uint8)
LABELS[1:3, 2:4, 2:5] = 1


def write(file: Path, labels: Any = LABELS, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda file: write(file, spacing=(1.0, 1.0, 3.0)), "spacing"),
        (lambda file: write(file, 2 * LABELS), "2"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "c"),
        (Path.unlink, "c"),
    ],
)
def test_a_faulty_prediction_is_named(tmp_path: Path, spoil: Callable[[Path], object], named: str) -> None:
    cases = {0: ("a", "b"), 1: ("c",)}
    description = {"labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    for fold, names in cases.items():
        for case in names:
            for folder in ("truths", *(f"{m.key}/fold_{fold}/validation" for m in (NNUNET, OTHER))):
                write(tmp_path / folder / f"{case}.nii.gz")

    def find() -> str | None:
        return faulty_prediction((NNUNET, OTHER), cases, tmp_path, tmp_path / "truths", description)

    assert find() is None
    file = tmp_path / OTHER.key / "fold_1" / "validation" / "c.nii.gz"
    spoil(file)
    told = find()
    assert told is not None and named in told and f"remove {file}" in told
