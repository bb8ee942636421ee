"""Fairness: each finding and each refusal, provoked in a small folder of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from masksam_nnunet.benchmarks.checks import check_fairness, check_splits, few_iterations, refuse_unfair
from masksam_nnunet.benchmarks.combine import kept_components
from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.evaluate import require_sound
from masksam_nnunet.benchmarks.folds import FoldRecord, input_hashes
from masksam_nnunet.benchmarks.results import Finding, FoldCompute, row_names
from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.errors import DataError, MaskSAMError
from masksam_nnunet.inference.label_maps import Classes
from masksam_nnunet.inference.methods import ModelName
from masksam_nnunet.plans.architecture import NETWORK_CLASS
from masksam_nnunet.sam_files import CHECKPOINTS

DATASET = "Dataset007_Fake"
NNUNET, OTHER, MASKSAM, *BUDGETS = (
    ModelName(trainer, plans, "3d_fullres")
    for trainer, plans in (
        *(("nnUNetTrainer", "nnUNetPlans"), ("nnUNetTrainerOther", "nnUNetPlans"), ("MaskSAMTrainer", "MaskSAMPlans")),
        *(("nnUNetTrainer_budget", "nnUNetPlans"), ("Mine_budget", "nnUNetPlans")),
    )
)
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "batch_size": 2,
    "patch_size": [8, 16, 16],
    "spacing": [3.0, 1.0, 1.0],
    "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {}},
}
DESCRIPTION = {"labels": {"background": 0, "a": 1}, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


class Results:
    """A fake dataset of four cases with two folds, and fake trained folds."""

    def __init__(self, root: Path) -> None:
        self.results, self.preprocessed = root / "results" / DATASET, root / "preprocessed" / DATASET
        cases = [f"fake_{i}" for i in range(4)]
        for case in cases:
            write_json(self.preprocessed / "gt_segmentations" / f"{case}.nii.gz", "truth")
        self.splits = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[2:], "val": cases[:2]}]
        write_json(self.preprocessed / "dataset.json", DESCRIPTION)
        write_json(self.preprocessed / "splits_final.json", self.splits)
        self.seconds: dict[str, float] = {}
        self.iterations: int | None = None

    def fold(self, method: ModelName, fold: int) -> Path:
        return self.results / method.key / f"fold_{fold}"

    def train(self, *methods: ModelName, backbone: str = "vit_b") -> None:
        """All folds of methods, as the benchmark leaves them."""
        for method in methods:
            plans = self.plans(method, backbone)
            for file in (self.preprocessed / f"{method.plans}.json", self.results / method.key / "plans.json"):
                write_json(file, plans)
            write_json(self.results / method.key / "dataset.json", DESCRIPTION)
            inputs = input_hashes(self.preprocessed, method.plans, "3d_fullres")
            for fold, split in enumerate(self.splits):
                for case in split["val"]:
                    write_json(self.fold(method, fold) / "validation" / f"{case}.nii.gz", "prediction")
                (self.fold(method, fold) / "training_log_2024.txt").write_text("SAM's weights loaded\n")
                FoldRecord(
                    trainer=method.trainer, plans=method.plans, configuration="3d_fullres", minutes=None, inputs=inputs
                ).write(self.fold(method, fold))

    def plans(self, method: ModelName, backbone: str) -> dict[str, Any]:
        configuration: dict[str, Any] = dict(CONFIGURATION)
        if method.trainer.startswith("MaskSAM"):
            config = MaskSAMConfig(backbone, (8, 16, 16), resolution=4).to_json()
            configuration["architecture"] = {"network_class_name": NETWORK_CLASS, "arch_kwargs": {"config": config}}
        return {"plans_name": method.plans, "dataset_name": DATASET, "configurations": {"3d_fullres": configuration}}

    def compute(self, *methods: ModelName) -> dict[str, list[FoldCompute]]:
        none: dict[str, Any] = dict.fromkeys(field.name for field in fields(FoldCompute))
        none["iterations"] = self.iterations
        return {
            name: [
                FoldCompute(**none | {"fold": fold, "seconds": self.seconds.get(f"{name} {fold}", 600.0)})
                for fold in (0, 1)
            ]
            for name in row_names(methods).values()
        }

    def check(self, *methods: ModelName) -> tuple[Finding, ...]:
        return check_fairness(methods, self.compute(*methods), self.results, self.preprocessed)


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


def test_splits_that_cannot_be_compared() -> None:
    for given, folds, named in (
        (SOUND, (3,), "--folds 3"),
        (SOUND, (0, 0), "--folds 0, 0"),
        (SOUND, (), "--folds"),
        (splits(("a", "")), (0,), "--folds 0"),
        (splits(("a", "b"), ("a", "b")), (0, 1), "b"),
    ):
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


def test_predictions_of_other_cases(results: Results) -> None:
    results.train(NNUNET, OTHER)
    write_json(results.fold(OTHER, 0) / "validation" / "fake_1.nii.gz", "prediction")
    findings = results.check(NNUNET, OTHER)
    (text,) = severe(findings)
    assert "nnUNetTrainerOther, fold 0" in text and "fake_1" in text and findings[0].severe


def test_time_budgets_must_be_the_same(results: Results) -> None:
    results.train(*BUDGETS)
    assert not severe(results.check(*BUDGETS))
    results.seconds["Mine_budget 1"] = 700.0
    (text,) = severe(results.check(*BUDGETS))
    assert "Mine_budget, fold 1: 700 s" in text
    results.iterations = 80
    findings = results.check(*BUDGETS)
    assert not severe(findings) and stated(findings, "80 iterations", "Mine_budget, fold 1: 700 s")


def test_few_iterations_are_stated(results: Results) -> None:
    for iterations, count in ((None, 0), (60, 0), (59, 1)):
        results.iterations = iterations
        findings = few_iterations(results.compute(*BUDGETS))
        assert len(findings) == count and all("Mine_budget: 59" in one.text for one in findings)


# ---- data and weights ------------------------------------------------------------------------------------------------


def change_configuration(results: Results, **values: object) -> None:
    file = results.results / OTHER.key / "plans.json"
    change_json(file, lambda plans: plans["configurations"]["3d_fullres"].update(values))


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
    file = results.results / OTHER.key / "dataset.json"
    change_json(file, lambda content: content.update(labels={"background": 0, "b": 1}))
    (text,) = severe(results.check(NNUNET, OTHER))
    assert "nnUNetTrainerOther" in text and "'b': 1" in text and "'a': 1" in text


def test_missing_files_are_named(results: Results) -> None:
    results.train(NNUNET)
    for file in (results.results / NNUNET.key / "dataset.json", results.results / NNUNET.key / "plans.json"):
        file.unlink()
        with pytest.raises(DataError, match=file.name):
            results.check(NNUNET)


def test_inputs_that_changed_since_the_training(results: Results) -> None:
    results.train(NNUNET, OTHER)
    (results.fold(OTHER, 1) / "benchmark_run.json").unlink()  # as if trained elsewhere
    names = ("splits_final.json", "nnUNetPlans.json", "dataset.json")
    file = results.fold(OTHER, 0) / "benchmark_run.json"
    change_json(file, lambda record: record["inputs"].update(dict.fromkeys(names, "0" * 64)))
    findings = results.check(NNUNET, OTHER)
    for name, text in zip(names, severe(findings), strict=True):
        assert name in text and text.endswith(": nnUNetTrainerOther, fold 0.")
    assert stated(findings, "nnUNetTrainerOther, fold 1")


def test_random_weights_in_place_of_sams_are_severe(results: Results) -> None:
    results.train(NNUNET, MASKSAM)
    findings = results.check(NNUNET, MASKSAM)
    assert not severe(findings) and stated(findings, "MaskSAMTrainer (MaskSAMPlans)", "vit_b")
    (results.fold(MASKSAM, 1) / "training_log_2024.txt").unlink()
    assert stated(results.check(NNUNET, MASKSAM), "MaskSAMTrainer (MaskSAMPlans), fold 1")
    (results.fold(MASKSAM, 0) / "training_log_2025.txt").write_text("WARNING: MASKSAM_RANDOM_INIT is set.\n")
    (text,) = severe(results.check(NNUNET, MASKSAM))
    assert "MASKSAM_RANDOM_INIT" in text and "MaskSAMTrainer (MaskSAMPlans), fold 0" in text
    start = f"SAM weights from /somewhere (SHA-256 {CHECKPOINTS['sam_vit_b'].sha256})"  # trained anew, with SAM
    (results.fold(MASKSAM, 0) / "training_log_2026.txt").write_text(start)
    assert not severe(results.check(NNUNET, MASKSAM))


def test_what_sam_has_seen_is_stated(results: Results) -> None:
    results.train(MASKSAM)
    log = results.fold(MASKSAM, 0) / "training_log_2025.txt"
    log.write_text(f"SAM weights from /somewhere (SHA-256 {CHECKPOINTS['medsam_vit_b'].sha256})")
    assert stated(results.check(MASKSAM), "medsam_vit_b", "credits ACDC")
    results.preprocessed = results.preprocessed.rename(results.preprocessed.with_name("Dataset027_ACDC"))
    results.results = results.results.rename(results.results.with_name("Dataset027_ACDC"))
    assert stated(results.check(MASKSAM), "medsam_vit_b was trained on ACDC", "Dataset027_ACDC")
    (results.fold(MASKSAM, 0) / log.name).write_text(f"SAM weights from /somewhere (SHA-256 {'0' * 64})")
    assert stated(results.check(MASKSAM), "no published SAM")


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


def test_a_faulty_prediction_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    cases = {0: ("a", "b"), 1: ("c",)}
    methods = (NNUNET, OTHER)
    benchmark = Benchmark(dataset=DATASET, configuration="3d_fullres", methods=methods, folds=(0, 1))
    write_json(benchmark.preprocessed / "dataset.json", DESCRIPTION)
    for fold, names in cases.items():
        validations = (benchmark.results / m.key / f"fold_{fold}" / "validation" for m in methods)
        for folder in (benchmark.preprocessed / "gt_segmentations", *validations):
            for case in names:
                write(folder / f"{case}.nii.gz")
    require_sound(benchmark, cases)
    file = benchmark.results / OTHER.key / "fold_1" / "validation" / "c.nii.gz"
    spoilt: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: write(file, spacing=(1.0, 1.0, 3.0)), "spacing"),
        (lambda: write(file, 2 * LABELS), "2"),
        (lambda: file.write_bytes(file.read_bytes()[:60]), "c"),
        (file.unlink, "c"),
    )
    for spoil, named in spoilt:
        spoil()
        with pytest.raises(DataError) as caught:
            require_sound(benchmark, cases)
        assert named in str(caught.value) and f"remove {file}" in str(caught.value)


# ---- what nnU-Net's post-processing keeps ----------------------------------------------------------------------------


def test_what_post_processing_keeps_is_named(tmp_path: Path) -> None:
    plain, regions = {"background": 0, "a": 1, "b": 2, "c": 3}, {"background": 0, "whole": [1, 2], "core": 2}
    for labels, kept, expected in (
        (plain, [[1, 2, 3], 1, 2, 2, [2, 3]], ["the whole foreground", "a", "b", "the labels 2, 3"]),
        (regions, [[1, 2], [2]], ["whole", "core"]),
        (plain, [], ["nothing helped"]),
    ):
        chosen = [{"labels_or_regions": one} for one in kept]
        write_json(tmp_path / "postprocessing.json", {"postprocessing_kwargs": chosen})
        order = {"regions_class_order": [1, 2]} if labels is regions else {}
        classes = Classes.from_dataset_json({**DESCRIPTION, **order, "labels": labels})
        assert kept_components(tmp_path, classes) == expected
