"""``masksam benchmark`` and ``masksam report`` as a user runs them, on two folds of two methods."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from nnunet_workspace import Dataset, Workspace

from masksam_nnunet.benchmarks.folds import locked

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def bench(workspace: Workspace, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The small dataset with a labelled test case, in a workspace of its own."""
    mine = Workspace(tmp_path_factory.mktemp("benchmark"), extra={"TEST_MIRRORING": "0"})
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(workspace, name) / dataset.name, getattr(mine, name) / dataset.name)
    raw = mine.raw / dataset.name
    for folder, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (raw / f"{folder}Ts").mkdir()
        shutil.copy(raw / f"{folder}Tr" / f"{dataset.cases[0]}{ending}", raw / f"{folder}Ts" / f"unseen{ending}")
    return mine


def test_a_grid_is_trained_compared_and_reported(bench: Workspace, dataset: Dataset) -> None:
    command = ["masksam", "benchmark", "-d", dataset.id, "--trainers", "ShortNNUNet", "ShortMaskSAM"]
    command += ["-f", 0, 1, "--devices", "cpu", "-np", 1]
    told = bench.run(*command)
    assert "0 of 4 folds are done" in told
    page = Path(told.splitlines()[-1])
    assert page == bench.results / dataset.name / "benchmark_3d_fullres" / "report.html"

    report = json.loads((page.parent / "report.json").read_text())
    kinds = [row["kind"] for row in report["rows"]]
    assert [kinds.count(kind) for kind in ("method", "ensemble", "postprocessed")] == [2, 1, 3]
    # a folder that nnU-Net itself has scored
    models = bench.results / dataset.name
    summary = models / "ShortMaskSAM__nnUNetPlans__3d_fullres" / "crossval_results_folds_0_1" / "summary.json"
    theirs = json.loads(summary.read_text())["foreground_mean"]["Dice"]
    scores = pd.read_csv(page.parent / "scores.csv")
    dice = scores[(scores["method"] == "ShortMaskSAM") & (scores["metric"] == "dice")]
    ours = dice.groupby("class")["value"].mean().mean()
    assert ours == pytest.approx(theirs, abs=1e-6)
    splits = json.loads((bench.preprocessed / dataset.name / "splits_final.json").read_text())
    assert set(scores["case"]) == {*splits[0]["val"], *splits[1]["val"]}
    assert len({line[0] for line in report["test_set"]["data"]}) == 3, "two methods and their ensemble"
    assert 'id="inside"' in page.read_text() and "could not be drawn" not in page.read_text()
    assert sum("nnUNetv2_train" in line for line in report["commands"]) == 4
    text = page.read_text()
    assert "nnUNetv2_ensemble" in text and "ShortNNUNet + ShortMaskSAM" in text

    # Nothing that is done is done again.
    kept = {file: file.stat().st_mtime_ns for file in models.rglob("*.pth")}
    kept |= {file: file.stat().st_mtime_ns for file in (page.parent / "test_set").rglob("*.nii.gz")}
    told = bench.run(*command)
    assert "4 of 4 folds are done" in told and len(kept) == 4 * 2 + 3
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    _refuses_what_changed(bench, dataset, page.parent, models)


def _refuses_what_changed(bench: Workspace, dataset: Dataset, out: Path, models: Path) -> None:
    fold = models / "ShortNNUNet__nnUNetPlans__3d_fullres" / "fold_1"
    checkpoint = fold / "checkpoint_final.pth"
    whole, then = checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns
    checkpoint.write_bytes(whole[: len(whole) // 2])
    told = bench.run("masksam", "report", out, fails=True)
    assert str(checkpoint) in told and "Traceback" not in told
    checkpoint.write_bytes(whole)
    os.utime(checkpoint, ns=(then, then))  # else its predictions would be older

    with locked(models, "", wait=0.1):
        told = bench.run("masksam", "report", out, fails=True)
    assert "evaluating" in told and "Traceback" not in told

    splits = bench.preprocessed / dataset.name / "splits_final.json"
    before = splits.read_text()
    folds = json.loads(before)
    folds[0]["train"].pop()
    splits.write_text(json.dumps(folds))
    told = bench.run("masksam", "report", out, fails=True)
    assert "splits_final.json" in told and "Traceback" not in told
    bench.run("masksam", "report", out, "--accept-unfair")
    text = (out / "report.html").read_text()
    body = text[text.index("<body") :]
    assert 0 < body.index("splits_final.json") < body.index("<table"), "the reason comes first"
    splits.write_text(before)

    stray = fold / "validation" / "another_case.nii.gz"
    shutil.copy(next(stray.parent.glob("*.nii.gz")), stray)
    told = bench.run("masksam", "report", out, fails=True)
    assert "another_case" in told and "--accept-unfair" in told
    stray.unlink()
