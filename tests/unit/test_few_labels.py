"""The few-label study: nested subsets of patients, views of nnU-Net's folders, what is refused, table and picture."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from empty_dataset import DATASET, place_dataset
from made_up_benchmark import long_table
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from masksam_nnunet.benchmarks import few_labels
from masksam_nnunet.benchmarks.definition import Benchmark
from masksam_nnunet.benchmarks.few_labels import ALL, COLUMNS, Subset, cut_splits, draw, mean_dice, parse_subsets
from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import MaskSAMError, TrainingError, UsageError
from masksam_nnunet.inference.methods import ModelName

CASES = [f"patient{n:03d}_frame{frame:02d}" for n in range(10) for frame in (1, 2)]
SPLITS = [{"train": [c for c in CASES if c not in CASES[4 * n :][:4]], "val": CASES[4 * n :][:4]} for n in range(5)]
PATIENTS = {case: case.split("_")[0] for case in CASES}
METHOD = ModelName("nnUNetTrainer", "nnUNetPlans", "3d_fullres")


@pytest.fixture
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = place_dataset(tmp_path, monkeypatch, CASES)
    (folder / "splits_final.json").write_text(json.dumps(SPLITS))
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Benchmark]:
    """Benchmarks that only write scores: a Dice of 1 - 1 / patients, in the folders that nnU-Net would use."""
    done: dict[str, Benchmark] = {}

    def run_benchmark(benchmark: Benchmark, out: Path, devices: Sequence[str], console: Console) -> Path:
        if out.name in os.environ.get("FAILING", ""):
            raise TrainingError("out of memory")
        splits = json.loads((benchmark.preprocessed / "splits_final.json").read_text())
        for job in benchmark.jobs():
            job.folder.mkdir(parents=True, exist_ok=True)
        dice = {f: 1 - 1 / len({PATIENTS[case] for case in splits[f]["train"]}) for f in benchmark.folds}
        values = {("nnUNetTrainer", c, "NA"): {"dice": dice[f], "hd95_mm": 1.0} for f in dice for c in splits[f]["val"]}
        fold_of = {case: fold for fold in dice for case in splits[fold]["val"]}
        scores = long_table(values)
        scores = scores.assign(fold=scores["case"].map(fold_of))
        out.mkdir(parents=True, exist_ok=True)
        both = pd.concat([scores, scores.assign(kind="postprocessed", method="nnUNetTrainer, post-processed")])
        both.to_csv(out / "scores.csv", index=False)
        done[out.name] = benchmark
        return out / "report.html"

    monkeypatch.setattr(few_labels, "run_benchmark", run_benchmark)
    return done


def study(out: Path | None, *sizes: str, seeds: Sequence[int] = (0,), console: Console | None = None) -> Path:
    benchmark = Benchmark(dataset=DATASET, configuration="3d_fullres", methods=(METHOD,), folds=(0, 1), device="cpu")
    return few_labels.run_few_labels(benchmark, out, ["cpu"], sizes, seeds, console or Console(file=io.StringIO()))


# ---- subsets ---------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_patients_with_all_their_cases() -> None:
    for seed in (0, 1, 2**32 - 1):
        smaller: list[set[str]] = [set()] * 5
        for size in range(1, 9):
            folds = cut_splits(SPLITS, PATIENTS, Subset(size, seed), range(5))
            assert [fold["val"] for fold in folds] == [fold["val"] for fold in SPLITS]
            found = [set(fold["train"]) for fold in folds]
            for before, now, whole in zip(smaller, found, SPLITS, strict=True):
                assert before < now <= set(whole["train"]) and len(now) == 2 * size
                assert len({PATIENTS[case] for case in now}) == size
            smaller = found
        assert folds == SPLITS


def test_draws() -> None:
    one, other = (cut_splits(SPLITS, PATIENTS, Subset(2, seed), [0]) for seed in (0, 1))
    assert one != other and one == cut_splits(SPLITS, PATIENTS, Subset(2), [0])
    # Pinned: another version must continue a study that an older one has begun.
    assert sorted({PATIENTS[case] for case in one[0]["train"]}) == ["patient005", "patient009"]
    uneven = [SPLITS[0], {"train": CASES[:2], "val": CASES[2:]}]
    assert cut_splits(uneven, PATIENTS, Subset(4), [0])[1] == uneven[1], "a fold that is not chosen"


def test_sizes_and_seeds() -> None:
    assert parse_subsets(["8", ALL, "2"], [0, 3]) == [
        *(Subset(2, 0), Subset(2, 3), Subset(8, 0), Subset(8, 3)),
        Subset(None),
    ]
    assert [one.name for one in parse_subsets(["2", ALL], [0, 1])] == ["train_2", "train_2_seed_1", "train_all"]
    for sizes, seeds, named in (
        (["0"], [0], "--train-cases 0: .*at least 1"),
        (["2", "-4"], [0], "--train-cases -4"),
        (["2.5"], [0], r"--train-cases 2\.5"),
        (["every"], [0], "--train-cases every: .*or all"),
        (["2", "02"], [0], "--train-cases 2 02: name each size once"),
        ([ALL, ALL], [0], "--train-cases all all"),
        (["2"], [1, 1], "--seeds 1 1"),
    ):
        with pytest.raises(UsageError, match=named):
            parse_subsets(sizes, seeds)


# ---- studies ---------------------------------------------------------------------------------------------------------


def test_a_study(preprocessed: Path, trained: dict[str, Benchmark], tmp_path: Path) -> None:
    printed = io.StringIO()
    picture = study(tmp_path / "out", "4", "2", ALL, seeds=(0, 1), console=Console(file=printed, width=100))
    assert picture == tmp_path / "out" / "few_labels.png" and imread(picture).shape[0] > 300
    names = ["train_2", "train_2_seed_1", "train_4", "train_4_seed_1", "train_all"]
    assert list(trained) == names and (trained["train_all"].train_patients, trained["train_all"].notes) == (None, ())
    assert "2 of its training patients, drawn with seed 1" in trained["train_2_seed_1"].notes[0]
    assert trained["train_2_seed_1"].command_line.endswith("--train-cases 2 --seeds 1")
    results = tmp_path / "out" / "train_2" / "nnUNet_results" / DATASET / METHOD.key
    own = preprocessed.parents[1] / "results" / DATASET / METHOD.key
    assert all((folder / "fold_1").is_dir() for folder in (results, own)), "all trains in nnU-Net's own folder"
    assert os.environ["nnUNet_results"] == str(preprocessed.parents[1] / "results")

    table = pd.read_csv(tmp_path / "out" / "few_labels.csv", keep_default_na=False)
    assert tuple(table.columns) == COLUMNS and len(table) == 5 * 8 and set(table["class"]) == {"NA"}
    assert set(zip(table["size"], table["training_patients"], table["dice"], strict=True)) == {
        *(("2", 2, 0.5), ("4", 4, 0.75), ("all", 8, 0.875))
    }
    words = printed.getvalue().split()
    assert all(word in words for word in ("2", "4", "all", "0.500", "0.750", "0.875"))


def test_a_view_shows_all_but_the_split(preprocessed: Path, trained: dict[str, Benchmark], tmp_path: Path) -> None:
    study(tmp_path, "2")
    view = tmp_path / "train_2" / "nnUNet_preprocessed" / DATASET
    for file in (file for file in preprocessed.iterdir() if file.name[0] != "."):
        assert (view / file.name).is_symlink() == (file.name != "splits_final.json")
        assert (view / file.name).exists()
    assert json.loads((preprocessed / "splits_final.json").read_text()) == SPLITS
    # Again: new plans are seen, and the split, whose hash is recorded by each training, stays as it is.
    before = (view / "splits_final.json").stat().st_mtime_ns
    (preprocessed / "OtherPlans.json").write_text("{}")
    (view / "dataset.json").unlink()
    (view / "dataset.json").symlink_to(tmp_path / "moved")
    study(tmp_path, "2", "4")
    assert (view / "splits_final.json").stat().st_mtime_ns == before
    assert (view / "OtherPlans.json").exists() and (view / "dataset.json").exists()
    (preprocessed / "splits_final.json").write_text(json.dumps(SPLITS[::-1]))
    with pytest.raises(UsageError, match=r"train_2 was begun with another split.*--out"):
        study(tmp_path, "2")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out"):
        study(tmp_path / "file", "2")


def test_what_fails_stops_no_other_subset(
    preprocessed: Path, trained: dict[str, Benchmark], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "train_2 train_8")
    with pytest.raises(TrainingError, match=r"train_2: out of memory\n\ntrain_8: out of memory"):
        study(None, "2", "4", "8")
    out = preprocessed.parents[1] / "results" / DATASET / "few_labels_3d_fullres"
    assert list(trained) == ["train_4"] and (out / "few_labels.png").is_file()


@pytest.mark.usefixtures("trained")
def test_what_the_folds_do_not_have_is_refused(preprocessed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--train-cases 9: fold 0 has only 8 training patients; give at most 8, or all"
    ):
        study(tmp_path / "out", "2", "9")
    with pytest.raises(UsageError, match="--train-cases 8 all: 8 patients are all"):
        study(tmp_path / "out", "8", ALL)
    (preprocessed / "nnUNetPlans.json").unlink()
    with pytest.raises(MaskSAMError, match="nnUNetPlans"):
        study(tmp_path / "out", "2")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("preprocessed", "trained")
def test_the_commands(tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(map(str, words)))
        return done.exit_code, " ".join(done.output.split())

    command = ("benchmark", "-d", 4, "--trainers", "nnunet", "-device", "cpu", "--out", tmp_path / "out", "-f", 0)
    code, said = run(*command, "--train-cases", 2, 4, "all", "--seeds", 0, 7)
    assert code == 0 and said.endswith("few_labels.png")
    assert (tmp_path / "out" / "train_4_seed_7" / "scores.csv").is_file()
    assert run(*command, "--seeds", 1)[1].count("--train-cases") == 2
    assert "--executor slurm" in run(*command, "--train-cases", 2, "--executor", "slurm")[1]
    assert "--train-cases 0" in run(*command, "--train-cases", 0)[1]
    # A subset's report is made from its own folds, which are missing, not from those trained on all patients.
    whole = Benchmark(dataset=DATASET, configuration="3d_fullres", methods=(METHOD,), folds=(0,), device="cpu")
    (whole.results / METHOD.key / "fold_0" / "checkpoint_final.pth").touch()
    whole.write(tmp_path / "out" / "train_2")
    assert "no checkpoint" in run("report", tmp_path / "out" / "train_2")[1]


# ---- table and picture -----------------------------------------------------------------------------------------------


def test_means_and_picture() -> None:
    lines = [
        (method, size, patients, seed, 0, f"p{n}", f"p{n}_{frame}", label, dice + n / 100 + seed / 10)
        for method, dice in (("A", 0.3), ("B $x$", 0.2), *((f"C{n}", 0.1) for n in range(7)))
        for size, patients, seeds in (("2", 2, (0, 1)), ("16", 16, (0, 1)), (ALL, 33, (0,)))
        for seed in seeds
        for n in range(4)
        for frame in range(2)
        for label in ("x", "y")
    ]
    scores = pd.DataFrame(lines, columns=list(COLUMNS))
    scores.loc[(scores["class"] == "y") & (scores["patient"] == "p1"), "dice"] = math.nan  # in neither: x counts
    scores.loc[(scores["method"] == "C6") & (scores["size"] == "2"), "dice"] = math.nan
    means = mean_dice(scores)
    assert list(means["size"].unique()) == ["2", "16", ALL] and len(means) == 27
    first = means.iloc[0]
    assert first["mean"] == pytest.approx(0.3 + 0.015 + 0.05) and first["draws"] == pytest.approx([0.315, 0.415])
    assert 0.35 < first["low"] < first["mean"] < first["high"] < 0.38, "drawn over patients, not over their values"
    assert means["mean"].isna().sum() == 1
    for table in (means, means[means["size"] == "2"].iloc[:1]):
        assert imread(io.BytesIO(draw(table, "Dataset001_Any, 2d, fold 0"))).std() > 0.01
