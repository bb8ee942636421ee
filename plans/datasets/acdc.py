"""ACDC: two frames of each patient's cine MR, by nnunetv2's converter and with its split by patient.

The official download holds training/patient001 to 100 and testing/patient101 to 150, each with Info.cfg, the whole
cine and the end-diastolic and end-systolic frames with their labels (testing labels came with a later release).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nnunetv2.dataset_conversion import Dataset027_ACDC
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from masksam_nnunet.errors import DataError
from masksam_nnunet.files import write_json

from ..raw_data import NUM_FOLDS
from .conversion import ENDING, Conversion, DownloadedImage, locate, nifti_names, require_sound

_PATIENTS = {"training": range(1, 101), "testing": range(101, 151)}
_LABELS = range(4)  # background, RV, MLV, LVC
_REMEDY = (
    "download ACDC again from https://humanheart-project.creatis.insa-lyon.fr/database/ and give the folder that holds "
    "training and testing; --partial accepts a download with fewer patients"
)
_ABOUT = {
    "name": "ACDC",
    "reference": "https://www.creatis.insa-lyon.fr/Challenge/acdc/, doi 10.1109/TMI.2018.2837502",
    "licence": "CC BY-NC-SA 4.0",
    "converted_by": "masksam convert acdc, with nnunetv2's Dataset027_ACDC",
}


def read_acdc(source: Path, *, partial: bool = False) -> Conversion:
    """Check a download; to be written are imagesTr, labelsTr, imagesTs, labelsTs, splits_final.json and frames.json.

    Cases are named as nnunetv2 names them, ``patient001_frame01``. ``frames.json`` holds ED or ES for each, from
    Info.cfg: frame 01 is not always ED. ``splits_final.json`` is nnunetv2's split by patient; nnU-Net's planning takes
    it from the raw dataset.

    Args:
        source: the folder that holds training and testing, or the one above it.
        partial: accept fewer patients than the official 100 and 50.

    Raises:
        DataError: files are missing, damaged or do not fit Info.cfg.
    """
    root = locate(source, ("database", "ACDC/database"), "training", _REMEDY)
    frames: dict[str, dict[str, str]] = {}
    images: list[DownloadedImage] = []
    defects: list[str] = []
    labelled = {part: _has_labels(root / part) for part in _PATIENTS}
    if not labelled["training"]:
        defects.append("training has no labels (patientXXX_frameYY_gt.nii.gz)")
    for part, official in _PATIENTS.items():
        patients, found = _patients(root / part, official, partial)
        defects += [f"{part}: {text}" for text in found]
        frames[part] = {}
        for patient in patients:
            folder = root / part / patient
            named, found = named_frames(folder)
            defects += [f"{part}/{patient}: {text}" for text in found]
            frames[part] |= named
            for case in named:
                label = folder / f"{case}_gt.nii.gz" if labelled[part] else None
                images.append(DownloadedImage(folder / f"{case}.nii.gz", label))
    require_sound(root, images, _LABELS, _REMEDY, defects)
    number = len({case.split("_")[0] for case in frames["training"]})
    if number < NUM_FOLDS:
        raise DataError(f"SOURCE {root}: {number} training patients, {NUM_FOLDS} folds need at least {NUM_FOLDS}")

    def write(raw: Path, dataset_id: int) -> None:
        _write(root, raw, dataset_id, frames, labelled["testing"])

    return Conversion(
        name="ACDC",
        training=tuple(frames["training"]),
        test=tuple(frames["testing"]),
        labelled_test=labelled["testing"],
        about=_ABOUT,
        write=write,
    )


def _has_labels(folder: Path) -> bool:
    return any(name.endswith("_gt.nii.gz") for patient in folder.glob("patient*") for name in nifti_names(patient))


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


def named_frames(folder: Path) -> tuple[dict[str, str], list[str]]:
    """ED or ES for each of a patient's two cases, as Info.cfg says, and what is wrong with them."""
    try:
        text = (folder / "Info.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}, ["Info.cfg is missing"]
    entries = {key: int(value) for key, value in re.findall(r"^\s*(ED|ES)\s*:\s*(\d+)\s*$", text, re.MULTILINE)}
    if len(set(entries.values())) != 2:
        return {}, ["Info.cfg does not name two frames, ED and ES"]
    named = {f"{folder.name}_frame{frame:02d}": phase for phase, frame in entries.items()}
    others = [
        name
        for name in nifti_names(folder)
        if not name.endswith("_4d.nii.gz") and name.removesuffix(".nii.gz").removesuffix("_gt") not in named
    ]
    return named, [f"{name} is no frame that Info.cfg names" for name in others]


def _write(root: Path, raw: Path, dataset_id: int, frames: dict[str, dict[str, str]], labelled_test: bool) -> None:
    folder = raw / f"Dataset{dataset_id:03d}_ACDC"
    parts = [folder / part for part in ("imagesTr", "labelsTr", "imagesTs")]
    for part in parts:
        part.mkdir(parents=True)
    Dataset027_ACDC.copy_files(root, *parts)
    # The converter also takes macOS's ._ files, whose names it cuts at the first dot.
    for path in (path for part in parts for path in part.iterdir() if path.name.startswith((".", "_"))):
        path.unlink()
    if labelled_test:
        (folder / "labelsTs").mkdir()
        for case in frames["testing"]:
            label = root / "testing" / case.split("_")[0] / f"{case}_gt{ENDING}"
            shutil.copy(label, folder / "labelsTs" / f"{case}{ENDING}")
    labels = {"background": 0, "RV": 1, "MLV": 2, "LVC": 3}
    generate_dataset_json(str(folder), {0: "cineMRI"}, labels, len(frames["training"]), ENDING)
    write_json(folder / "splits_final.json", Dataset027_ACDC.create_ACDC_split(str(folder / "labelsTr")))
    write_json(folder / "frames.json", frames["training"] | frames["testing"])
