"""Small replicas of the challenges' official folder structures, with what trips converters up in the real ones.

Every volume has a size, spacing and direction of its own, so that a mix-up of files is seen.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

AMOS_LABELS = (
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta",
    "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip


def shape_of(seed: int) -> tuple[int, int, int]:
    return 4 + seed % 3, 5 + seed // 3 % 4, 3 + seed // 12 % 5


def affine_of(seed: int) -> np.ndarray:
    """Spacing, an axis order and signs that depend on ``seed``."""
    axes = np.eye(3)[:, [(0, 1, 2), (1, 0, 2), (2, 0, 1)][seed % 3]]
    signs = [-1.0 if seed >> bit & 1 else 1.0 for bit in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = axes * np.multiply(signs, [1.0 + seed / 100, 1.5, 2.0 + seed / 50])
    affine[:3, 3] = seed, -seed, 2 * seed
    return affine


def write_image(path: Path, seed: int, channels: int = 1) -> None:
    shape = shape_of(seed) if channels == 1 else (*shape_of(seed), channels)
    values = np.random.default_rng(seed).integers(-100, 1000, shape).astype(np.int16)
    _save(path, values, seed)


def write_label(path: Path, seed: int, classes: int) -> None:
    """Voxels hold the values 0 to ``classes``, all of them where there is room."""
    values = (np.arange(np.prod(shape_of(seed))) + seed) % (classes + 1)
    _save(path, values.reshape(shape_of(seed)).astype(np.uint8), seed)


def _save(path: Path, values: np.ndarray, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine_of(seed)), path)


def macos_file(path: Path) -> None:
    """The ._ file that macOS puts beside ``path`` on foreign disks and in archives."""
    path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")


def volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine matrix of a file."""
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


def same_volume(one: Path, other: Path) -> bool:
    """Both files hold the same values in the same place."""
    (a, placed_a), (b, placed_b) = volume(one), volume(other)
    return a.shape == b.shape and np.array_equal(a, b) and np.allclose(placed_a, placed_b, atol=1e-5)


def nnunet_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's variables name folders in ``root`` that are still to be made; nnUNet_raw."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(root / name))
    return root / "nnUNet_raw"


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files included, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def nnunet_reads(folder: Path, case: str) -> None:
    """nnU-Net's usual reader finds a case's image and label at the same place."""
    reader = SimpleITKIO()
    images, placed = reader.read_images(
        [str(path) for path in sorted((folder / "imagesTr").glob(f"{case}_????.nii.gz"))]
    )
    label, label_placed = reader.read_seg(str(folder / "labelsTr" / f"{case}.nii.gz"))
    assert images.shape[1:] == label.shape[1:]
    for key, value in placed["sitk_stuff"].items():
        assert np.allclose(value, label_placed["sitk_stuff"][key], atol=1e-5), key


# --- ACDC -------------------------------------------------------------------------------------------------------------


def acdc_frames(number: int) -> tuple[int, int]:
    """Numbers of the ED and ES frames; patient090 is the real exception to ED = 1."""
    return (4, 11) if number == 90 else (1, 8 + number % 7)


def build_acdc(
    root: Path,
    training: Iterable[int] = range(1, 101),
    testing: Iterable[int] = range(101, 151),
    labelled_test: bool = True,
) -> Path:
    """The download as unpacked: ``database`` with a citation file, training and testing."""
    base = root / "database"
    for part, numbers in (("training", training), ("testing", testing)):
        (base / part).mkdir(parents=True)
        (base / part / "MANDATORY_CITATION.md").write_text("Bernard et al.\n")
        for number in numbers:
            _acdc_patient(base / part / f"patient{number:03d}", number, part == "training" or labelled_test)
    (base / "MANDATORY_CITATION.md").write_text("Bernard et al.\n")
    (base / ".DS_Store").write_bytes(b"\x00")
    return base


def _acdc_patient(folder: Path, number: int, labelled: bool) -> None:
    folder.mkdir()
    ed, es = acdc_frames(number)
    (folder / "MANDATORY_CITATION.md").write_text("Bernard et al.\n")
    (folder / "Info.cfg").write_text(
        f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: {es + 15}\nWeight: 95.0\n"
    )
    (folder / f"{folder.name}_4d.nii.gz").write_bytes(b"the whole cine, which nobody may read")
    for frame in (ed, es):
        image = folder / f"{folder.name}_frame{frame:02d}.nii.gz"
        write_image(image, number + frame)
        macos_file(image)
        if labelled:
            label = folder / f"{folder.name}_frame{frame:02d}_gt.nii.gz"
            write_label(label, number + frame, 3)
            macos_file(label)


# --- AMOS -------------------------------------------------------------------------------------------------------------


def build_amos(
    root: Path,
    training: Sequence[int] = (1, 4, 410, 507, 600),
    validation: Sequence[int] = (8, 409, 540),
    test: Sequence[int] = (2, 411, 500, 555),
) -> Path:
    """The release after the challenge: numbers above 500 are MR, the test images have no labels."""
    base = root / "amos22"
    parts = {"training": ("Tr", training), "validation": ("Va", validation), "test": ("Ts", test)}
    listed: dict[str, list[dict[str, str]]] = {}
    for part, (suffix, numbers) in parts.items():
        listed[part] = []
        for number in numbers:
            name = f"amos_{number:04d}.nii.gz"
            write_image(base / f"images{suffix}" / name, number)
            macos_file(base / f"images{suffix}" / name)
            entry = {"image": f"./images{suffix}/{name}"}
            if part != "test":
                write_label(base / f"labels{suffix}" / name, number, 15)
                entry["label"] = f"./labels{suffix}/{name}"
            listed[part].append(entry)
    description = {
        "name": "AMOS",
        "description": "replica",
        "labels": {str(value): name for value, name in enumerate(AMOS_LABELS)},
        "numTraining": len(training),
        "numValidation": len(validation),
        "numTest": len(test),
        **listed,
    }
    (base / "dataset.json").write_text(json.dumps(description))
    return base


# --- Synapse ----------------------------------------------------------------------------------------------------------

SYNAPSE_LABELLED = (*range(1, 11), *range(21, 41))


def build_synapse(
    root: Path,
    labelled: Iterable[int] = SYNAPSE_LABELLED,
    unlabelled: Iterable[int] = range(61, 81),
    test_folder: str = "Test",
) -> Path:
    """RawData of the abdomen challenge; labels are stored as floating-point numbers in some of its files."""
    base = root / "RawData"
    for number in labelled:
        image = base / "Training" / "img" / f"img{number:04d}.nii.gz"
        write_image(image, number)
        macos_file(image)
        label = base / "Training" / "label" / f"label{number:04d}.nii.gz"
        write_label(label, number, 13)
        if number % 2:
            values, affine = volume(label)
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), label)
    for number in unlabelled:
        write_image(base / test_folder / "img" / f"img{number:04d}.nii.gz", number)
    return base


# --- MSD --------------------------------------------------------------------------------------------------------------


def build_msd(
    root: Path,
    name: str = "Task04_Hippocampus",
    training: Sequence[int] = (1, 3, 4, 6, 7),
    test: Sequence[int] = (2, 5),
    channels: Sequence[str] = ("MRI",),
) -> Path:
    """A task of the decathlon; images of several channels are 4D files. numTraining is wrong in some real tasks."""
    base = root / name
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (base / part).mkdir(parents=True)
    stem = name.split("_")[1].lower()
    for number in training:
        image = base / "imagesTr" / f"{stem}_{number:03d}.nii.gz"
        write_image(image, number, len(channels))
        macos_file(image)
        label = base / "labelsTr" / f"{stem}_{number:03d}.nii.gz"
        write_label(label, number, 2)
        macos_file(label)
    for number in test:
        image = base / "imagesTs" / f"{stem}_{number:03d}.nii.gz"
        write_image(image, number, len(channels))
        macos_file(image)
    description = {
        "name": name.split("_")[1],
        "description": "replica",
        "reference": "Vanderbilt University Medical Center",
        "licence": "CC-BY-SA 4.0",
        "tensorImageSize": "3D" if len(channels) == 1 else "4D",
        "modality": {str(index): channel for index, channel in enumerate(channels)},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": len(training) + 1,
        "numTest": len(test),
        "training": [
            {"image": f"./imagesTr/{stem}_{n:03d}.nii.gz", "label": f"./labelsTr/{stem}_{n:03d}.nii.gz"}
            for n in training
        ],
        "test": [f"./imagesTs/{stem}_{n:03d}.nii.gz" for n in test],
    }
    (base / "dataset.json").write_text(json.dumps(description))
    macos_file(base / "dataset.json")
    return base


def tar_of(folder: Path, *extra: tarfile.TarInfo) -> bytes:
    """An uncompressed tar file of ``folder``, by its name, and of ``extra`` members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=folder.name)
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()
