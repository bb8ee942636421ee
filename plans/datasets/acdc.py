"""ACDC: two frames of each patient's cine MR, named and split by patient as by nnunetv2's converter.

The official download holds training/patient001 to 100 and testing/patient101 to 150, each with Info.cfg, the whole
cine and the end-diastolic and end-systolic frames with their labels (testing labels came with a later release).
"""

from __future__ import annotations

import re
from pathlib import Path

from nnunetv2.dataset_conversion.Dataset027_ACDC import create_ACDC_split

from masksam_nnunet.files import write_json

from ..raw_data import NUM_FOLDS
from .conversion import ENDING, Download, DownloadedCase, locate

_PATIENTS = {"training": range(1, 101), "testing": range(101, 151)}
_REMEDY = (
    "download ACDC again from https://humanheart-project.creatis.insa-lyon.fr/database/ and give the folder that holds "
    "training and testing; --partial accepts a download with fewer patients"
)
_ABOUT = {
    "name": "ACDC",
    "reference": "https://www.creatis.insa-lyon.fr/Challenge/acdc/, doi 10.1109/TMI.2018.2837502",
    "licence": "CC BY-NC-SA 4.0",
    "converted_by": "masksam convert acdc",
}


def read_acdc(source: Path, *, partial: bool = False) -> Download:
    """Two cases of each patient, such as ``patient001_frame01``.

    The dataset also gets ``frames.json``, which holds ED or ES for each case (from Info.cfg: frame 01 is not always
    ED), and nnunetv2's split by patient as ``splits_final.json``, which nnU-Net's planning takes from the raw dataset.

    Args:
        source: the folder that holds training and testing, or the one above it.
        partial: accept fewer patients than the official 100 and 50.
    """
    root = locate(source, ("database", "ACDC/database"), "training", _REMEDY)
    frames: dict[str, str] = {}
    cases: list[DownloadedCase] = []
    defects: list[str] = []
    for part, official in _PATIENTS.items():
        patients, found = _patients(root / part, official, partial)
        defects += [f"{part}: {text}" for text in found]
        if part == "training" and len(patients) < NUM_FOLDS:
            defects.append(f"{len(patients)} training patients, {NUM_FOLDS} folds need at least {NUM_FOLDS}")
        labelled = part == "training" or any((root / part).glob("patient*/[!.]*_gt.nii.gz"))
        for patient in patients:
            folder = root / part / patient
            named = named_frames(folder)
            if not named:
                defects.append(f"{part}/{patient}/Info.cfg is missing, or does not name two frames, ED and ES")
            frames |= named
            for case in named:
                label = folder / f"{case}_gt{ENDING}" if labelled else None
                cases.append(DownloadedCase(case, folder / f"{case}{ENDING}", label, part == "testing"))

    def finish(folder: Path) -> None:
        write_json(folder / "splits_final.json", create_ACDC_split(str(folder / "labelsTr")))
        write_json(folder / "frames.json", frames)

    return Download(
        root,
        _REMEDY,
        name="ACDC",
        cases=cases,
        channels=["cineMRI"],
        labels={"background": 0, "RV": 1, "MLV": 2, "LVC": 3},
        about=_ABOUT,
        defects=defects,
        finish=finish,
    )


def _patients(folder: Path, official: range, partial: bool) -> tuple[list[str], list[str]]:
    """The patients' folders, and what is wrong with their set."""
    if not folder.is_dir():
        return [], ["the folder is missing"]
    present = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    known = [f"patient{number:03d}" for number in official]
    defects = [f"{name} is not a folder of ACDC" for name in present if name not in known]
    if not partial:
        defects += [f"{name} is missing" for name in known if name not in present]
    return [name for name in present if name in known], defects


def named_frames(folder: Path) -> dict[str, str]:
    """ED or ES for each of a patient's two cases, as Info.cfg says; empty where it does not name two frames."""
    try:
        text = (folder / "Info.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    entries = {key: int(value) for key, value in re.findall(r"^\s*(ED|ES)\s*:\s*(\d+)\s*$", text, re.MULTILINE)}
    named = {f"{folder.name}_frame{frame:02d}": phase for phase, frame in entries.items()}
    return named if len(named) == 2 else {}
