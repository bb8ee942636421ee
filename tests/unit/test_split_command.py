"""`masksam split`: a regular expression finds patients, folds keep them together; and planning's warning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from challenge_replicas import nnunet_folders
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import DataError
from masksam_nnunet.plans.splits import (
    BY_CASE,
    group_by_patient,
    group_by_regex,
    patient_folds,
    patient_of,
    split_dataset,
    split_warning,
)

CASES = [f"patient{patient:03d}_frame{frame:02d}" for patient in range(1, 12) for frame in (1, 12)]
GROUP = r"(patient\d+)_"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnUNet_raw with dataset 27, whose files are empty: only their names count."""
    folder = nnunet_folders(tmp_path, monkeypatch)
    make_dataset(folder / "Dataset027_ACDC", CASES)
    return folder


def make_dataset(folder: Path, cases: list[str]) -> None:
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (folder / part).mkdir(parents=True)
        for case in cases:
            (folder / part / f"{case}{ending}").touch()
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "heart": 1}, "file_ending": ".nii.gz"}
    description |= {"numTraining": len(cases)}
    (folder / "dataset.json").write_text(json.dumps(description))


def split_file(raw: Path) -> Path:
    return raw.parent / "nnUNet_preprocessed" / "Dataset027_ACDC" / "splits_final.json"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["split", *arguments])


# --- grouping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regex", "patients"),
    [
        (r"(p\d+)_", ["p1", "p2"]),
        (r"p\d+", ["p1", "p2"]),  # no group: the whole match
        (r"_(?P<patient>p\d+)_(t\d)", ["p1", "p2"]),  # the named group alone
        (r"(site\d)_(p\d)", ["site1_p1", "site1_p2", "site2_p1"]),
        (r"^(site\d)(?:_p1)?", ["site1", "site2"]),
        (r"(site2)?_(p\d)", ["p1", "p2", "site2_p1"]),  # groups that take no part are left out
    ],
)
def test_what_tells_the_patient(regex: str, patients: list[str]) -> None:
    cases = ["site1_p1_t0", "site1_p1_t1", "site1_p2_t0", "site1_p2_t1", "site2_p1_t0", "site2_p1_t1"]
    groups = group_by_regex(reversed(cases), regex)
    assert sorted(groups) == patients
    assert sorted(case for members in groups.values() for case in members) == cases
    assert all(members == sorted(members) for members in groups.values())


@pytest.mark.parametrize("regex", ["(patient", r"(patient00\d)_", r"(\d*)", r"(.+)", r"(patient)"])
def test_expressions_that_do_not_group(regex: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"--group '{regex}'")):
        group_by_regex(CASES, regex)


@pytest.mark.parametrize(
    "cases",
    [
        [f"hippocampus_{i:03d}" for i in range(20)],  # the prefix names the data set
        [f"liver_{i}" for i in range(5)] + [f"spleen_{i}" for i in range(5)],  # prefixes without a number
        [f"patient{i:03d}_frame01" for i in range(20)],  # one case for each patient
        [f"set3_{i:03d}" for i in range(20)],  # a number, but one prefix only
        [],
    ],
)
def test_no_patients_in_these_names(cases: list[str]) -> None:
    assert group_by_patient(cases) is None


# --- the file ---------------------------------------------------------------------------------------------------------


def test_split(raw: Path) -> None:
    report = split_dataset("27", GROUP)
    assert report.path == split_file(raw) and report.written and report.notes == []
    splits = json.loads(report.path.read_text())
    assert len(splits) == 5
    assert sorted(case for fold in splits for case in fold["val"]) == CASES
    assert report.folds == splits
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == CASES
        train, val = ({report.patients[case] for case in fold[part]} for part in ("train", "val"))
        assert not train & val
    assert splits == patient_folds(group_by_patient(CASES) or {})
    assert [path.name for path in report.path.parent.iterdir()] == ["splits_final.json"]


def test_another_split_is_not_replaced_unasked(raw: Path) -> None:
    before = split_dataset("27", GROUP).path.read_text()
    assert not split_dataset("27", GROUP).written
    with pytest.raises(DataError, match=r"splits_final\.json .*--force"):
        split_dataset("27", GROUP, seed=1)
    assert split_file(raw).read_text() == before
    assert split_dataset("27", GROUP, seed=1, force=True).written
    assert split_file(raw).read_text() != before

    reordered = [{part: fold[part][::-1] for part in fold} for fold in json.loads(before)]
    split_file(raw).write_text(json.dumps(reordered))
    assert not split_dataset("27", GROUP).written  # the order does not count
    for damaged in ("{", "null"):
        split_file(raw).write_text(damaged)
        with pytest.raises(DataError, match="--force"):
            split_dataset("27", GROUP)
        assert split_dataset("27", GROUP, force=True).written


def test_a_split_in_the_raw_dataset_is_mentioned_and_replaced_when_forced(raw: Path) -> None:
    theirs = raw / "Dataset027_ACDC" / "splits_final.json"
    theirs.write_text(split_dataset("27", GROUP).path.read_text())
    assert split_dataset("27", GROUP).notes == []
    other = json.loads(theirs.read_text())[::-1]
    theirs.write_text(json.dumps(other))
    (note,) = split_dataset("27", GROUP).notes
    assert str(theirs) in note and "--force" in note
    assert json.loads(theirs.read_text()) == other
    report = split_dataset("27", GROUP, force=True)
    assert report.written and report.notes == [] and json.loads(theirs.read_text()) == other[::-1]


def test_cases_of_a_preprocessed_dataset(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = split_dataset("27", GROUP).path.read_text()
    folder = split_file(raw).parent
    split_file(raw).unlink()
    (raw / "Dataset027_ACDC" / "labelsTr").rename(folder / "gt_segmentations")
    (raw / "Dataset027_ACDC" / "dataset.json").rename(folder / "dataset.json")
    monkeypatch.delenv("nnUNet_raw")
    assert split_dataset("27", GROUP).path.read_text() == expected


def test_datasets_that_cannot_be_split(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="-d 5 "):
        split_dataset("5", GROUP)
    (raw / "Dataset028_Empty").mkdir()
    with pytest.raises(DataError, match="Dataset028_Empty"):
        split_dataset("28", GROUP)
    (raw / "Dataset027_Other").mkdir()
    with pytest.raises(DataError, match=r"-d 27 .*Dataset027_Other"):
        split_dataset("27", GROUP)
    (split_file(raw).parent.parent / "Dataset030_Broken" / "gt_segmentations").mkdir(parents=True)
    with pytest.raises(DataError, match="Dataset030_Broken"):
        split_dataset("30", GROUP)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(DataError, match="nnUNet_preprocessed"):
        split_dataset("27", GROUP)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(raw: Path) -> None:
    result = invoke("-d", "27", "--group", GROUP)
    assert result.exit_code == 0 and result.stderr == ""
    first, head, *rows = result.stdout.splitlines()
    assert first == f"{split_file(raw)} written" and head.startswith("fold  train patients (cases)")
    assert rows[0].split() == ["0", "8", "(16)", "3", "(6)"] and rows[4].split() == ["4", "9", "(18)", "2", "(4)"]
    assert "has this split already" in invoke("-d", "27", "--group", GROUP).stdout

    refused = invoke("-d", "27", "--group", GROUP, "--seed", "3")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ") and "--force" in refused.stderr
    assert "--folds 12" in invoke("-d", "27", "--group", GROUP, "--folds", "12").stderr
    forced = invoke("-d", "27", "--group", GROUP, "--seed", "3", "--folds", "4", "--force")
    assert forced.exit_code == 0 and len(forced.stdout.splitlines()) == 6
    assert forced.stderr.startswith("note: ")
    for bad in (["--group", "x"], ["-d", "27"], ["-d", "27", "--group", GROUP, "--folds", "1"]):
        assert invoke(*bad).exit_code == 2


def test_names_that_begin_with_centres() -> None:
    """They look like patients with several cases; the warning names the expression that takes each case by itself."""
    cases = [f"site{site}_{number:03d}" for site in (1, 2) for number in range(4)]
    assert (warning := split_warning(cases, None, 27)) is not None and f"--group '{BY_CASE}'" in warning
    assert group_by_regex(cases, BY_CASE) == {case: [case] for case in cases}


# --- the warning ------------------------------------------------------------------------------------------------------


def remedy_of(warning: str) -> str:
    match = re.search(r"masksam split -d \S+ --group '(.+)'$", warning)
    assert match is not None, warning
    return match[1]


@pytest.mark.parametrize(
    "cases",
    [
        CASES,
        [f"BraTS-GLI-{patient:05d}-{visit}" for patient in range(9) for visit in (100, 101)],
        [*CASES, "scan"],  # a name without a separator
        [*CASES, "_1"],
    ],
)
def test_the_warning_names_a_command_that_works(cases: list[str]) -> None:
    warning = split_warning(cases, None, 27)
    assert warning is not None and "by case" in warning and "-d 27" in warning
    groups = group_by_regex(cases, remedy_of(warning))
    assert groups == group_by_patient(cases)
    assert split_warning(cases, patient_folds(groups)) is None


def test_the_warning_gives_an_example() -> None:
    warning = split_warning(CASES, None)
    assert warning is not None and "patient001_frame01, patient001_frame12" in warning and "-d ID" in warning

    splits = patient_folds(group_by_regex(CASES, GROUP))
    splits[2]["val"].append(splits[2]["train"].pop())
    warning = split_warning(CASES, splits)
    assert warning is not None and "fold 2" in warning
    train, val = re.findall(r"patient\d+_frame\d+", warning)
    assert patient_of(train) == patient_of(val) and train in splits[2]["train"] and val in splits[2]["val"]
