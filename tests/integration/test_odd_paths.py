"""Spaces, quotes, brackets and letters beyond ASCII in every name, through plan, train, predict and export."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import SimpleITK as sitk
from kinds_of_data import Kind
from nnunet_workspace import Workspace

pytestmark = pytest.mark.integration

KIND = Kind(48, "Größe", [(4, 24, 20)] * 5, {"background": 0, "Niere [links]": 1}, (1,))
FOLDER = "Ä b'c [1] 数据"
TRAINER = "ShortMaskSAM"


def test_from_raw_data_to_an_exported_model(tmp_path: Path) -> None:
    place = Workspace(tmp_path / FOLDER)
    raw = KIND.write(place.raw)
    for case in KIND.cases:
        for path in (raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"):
            path.rename(path.with_name(path.name.replace("case_", "Fall é ")))
    out, archive = tmp_path / FOLDER / "aus gabe", tmp_path / FOLDER / "Modell é.zip"
    model = ["-d", KIND.id, "-c", "3d_fullres", "-p", "MaskSAMPlans", "-tr", TRAINER, "-f", 0]
    place.run_all(
        ["masksam", "check", "-d", KIND.id],
        ["nnUNetv2_plan_and_preprocess", "-d", KIND.id, "-c", "3d_fullres", "-np", 1, "-npfp", 1],
        ["masksam", "plan", "-d", KIND.dataset, "-c", "3d_fullres", "--backbone", "tiny"],
        ["masksam", "train", KIND.id, "3d_fullres", 0, "-p", "MaskSAMPlans", "-tr", TRAINER, "-device", "cpu"],
        ["masksam", "predict", "-i", raw / "imagesTr", "-o", out, *model, "-device", "cpu", "-npp", 0, "-nps", 0],
        ["masksam", "export", *model, "-o", archive],
        TEST_MIRRORING="0",
    )
    names = sorted(path.name for path in (raw / "labelsTr").iterdir())
    assert names[0] == "Fall é 00.nii.gz"
    assert sorted(path.name for path in out.glob("*.nii.gz")) == names
    for name in names:
        prediction, image = (
            sitk.ReadImage(str(path))
            for path in (out / name, raw / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz"))
        )
        assert prediction.GetSize() == image.GetSize()
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        assert any(
            name.startswith(f"{KIND.dataset}/") and name.endswith("checkpoint_final.pth") for name in opened.namelist()
        )
