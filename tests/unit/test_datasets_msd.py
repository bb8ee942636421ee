"""The decathlon's tasks: 4D files become a file for each channel; and the convert command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from challenge_replicas import build_msd, nnunet_folders, nnunet_reads, same_volume, volume, write_image
from typer.testing import CliRunner, Result

from masksam_nnunet.cli.app import app
from masksam_nnunet.errors import DataError
from masksam_nnunet.plans import datasets
from masksam_nnunet.plans.datasets import convert


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return nnunet_folders(tmp_path, monkeypatch)


def test_one_channel(raw: Path, tmp_path: Path) -> None:
    source = build_msd(tmp_path)
    folder = convert("msd", source, 4, processes=1)
    assert folder == raw / "Dataset004_Hippocampus"
    assert sorted(path.name for path in folder.rglob("*.nii.gz")) == sorted(
        [f"hippocampus_{n:03d}_0000.nii.gz" for n in range(1, 8)]
        + [f"hippocampus_{n:03d}.nii.gz" for n in (1, 3, 4, 6, 7)]
    )
    for case in ("hippocampus_003", "hippocampus_007"):
        assert same_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", source / "imagesTr" / f"{case}.nii.gz")
        assert same_volume(folder / "labelsTr" / f"{case}.nii.gz", source / "labelsTr" / f"{case}.nii.gz")
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "MRI"}
    assert description["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert description["licence"] == "CC-BY-SA 4.0" and description["reference"].startswith("Vanderbilt")
    assert description["numTraining"] == 5  # the download says 6
    nnunet_reads(folder, "hippocampus_004")


def test_several_channels(raw: Path, tmp_path: Path) -> None:
    source = build_msd(tmp_path, "Task05_Prostate", channels=("T2", "ADC"))
    folder = convert("msd", Path(f"{source}/"), 5, processes=1)
    values, affine = volume(source / "imagesTr" / "prostate_006.nii.gz")
    for channel in range(2):
        part, placed = volume(folder / "imagesTr" / f"prostate_006_{channel:04d}.nii.gz")
        assert np.array_equal(part, values[..., channel]) and np.allclose(placed, affine, atol=1e-5)
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "T2", "1": "ADC"}
    assert len(list((folder / "imagesTs").iterdir())) == 4
    nnunet_reads(folder, "prostate_006")


def _describe(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def describe(source: Path) -> None:
        path = source / "dataset.json"
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return describe


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: (s / "labelsTr" / "hippocampus_003.nii.gz").unlink(), "labelsTr/hippocampus_003.nii.gz"),
        (lambda s: (s / "imagesTs" / "hippocampus_002.nii.gz").unlink(), "imagesTs/hippocampus_002.nii.gz"),
        (lambda s: write_image(s / "imagesTr" / "hippocampus_009.nii.gz", 9), "labelsTr/hippocampus_009.nii.gz"),
        (lambda s: write_image(s / "imagesTr" / "hippocampus_003.nii.gz", 3, 2), "imagesTr/hippocampus_003.nii.gz"),
        (lambda s: (s / "imagesTs").rename(s / "images"), "imagesTs"),
        (lambda s: (s / "dataset.json").unlink(), "dataset.json"),
        (lambda s: s.rename(s.with_name("Task04_Hippocampus.old")), "Task04_Hippocampus"),
        (_describe(lambda d: d.pop("modality")), "modality"),
        (_describe(lambda d: d["modality"].update({"1": "T2"})), "imagesTr/hippocampus_001.nii.gz"),
        (_describe(lambda d: d["labels"].pop("2")), "labels 2"),
        (_describe(lambda d: d["test"].append(3)), "'test'"),
    ],
)
def test_defects(raw: Path, tmp_path: Path, change: Callable[[Path], object], named: str) -> None:
    source = build_msd(tmp_path)
    change(source)
    with pytest.raises(DataError) as error:
        convert("msd", source, 4, processes=1)
    assert named in str(error.value)
    assert not raw.exists()


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_converts(raw: Path, tmp_path: Path) -> None:
    source = build_msd(tmp_path)
    result = invoke("convert", "msd", source, "-d", 44, "--processes", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{raw / 'Dataset044_Hippocampus'}\n"
    assert "nnUNetv2_plan_and_preprocess -d 44" in result.stderr
    again = invoke("convert", "msd", source, "-d", 44)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("error: ") and "-d 44" in again.stderr


def test_wrong_command_lines(raw: Path) -> None:
    for line in ("brats b -d 1", "acdc a", "acdc a -d 0", "acdc a -d x", "amos m -d 3 --modality mr", "acdc -d 1"):
        assert invoke("convert", *line.split()).exit_code == 2, line
    assert not raw.exists()
    assert all(name in invoke("convert", "--help").stdout for name in datasets.READERS)
