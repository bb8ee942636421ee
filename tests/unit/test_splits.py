"""Folds by patient where case names tell patients apart, and only there."""

from __future__ import annotations

import json

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from masksam_nnunet.plans.splits import group_by_patient, patient_folds, patient_of

ACDC = [f"patient{patient:03d}_frame{frame:02d}" for patient in range(1, 21) for frame in (1, 12)]


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


def test_acdc_patients_stay_together() -> None:
    groups = group_by_patient(reversed(ACDC))
    assert groups is not None and len(groups) == 20
    assert groups["patient001"] == ["patient001_frame01", "patient001_frame12"]
    folds = patient_folds(groups)
    assert len(folds) == 5
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(ACDC)
        assert not {patient_of(c) for c in fold["train"]} & {patient_of(c) for c in fold["val"]}
        assert len(fold["val"]) == 8
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(ACDC)


def test_folds_draw_patients_as_nnunet_draws_cases_and_are_plain_json() -> None:
    groups = group_by_patient(ACDC)
    assert groups is not None
    folds = json.loads(json.dumps(patient_folds(groups)))
    theirs = generate_crossval_split(sorted(groups), seed=12345, n_splits=5)
    for ours, fold in zip(folds, theirs, strict=True):
        assert {patient_of(case) for case in ours["val"]} == set(fold["val"])
    assert all(type(case) is str for fold in patient_folds(groups) for case in fold["train"])
